"""A ResNet under attribution, where batch norms in training mode are refused: frozen, or as group norms.

    python examples/resnet_digits.py

Scikit-learn's digits, of which one in ten gets a wrong label. *Frozen*: the network trains for one epoch as it is, without
attribution; then its batch norms keep their statistics, as in detection and fine-tuning, and their weights train on. *Group
norms* need no such beginning. Prints the accuracy of both, and how well low scores tell the wrong labels.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import adam_ghost

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, val = order[:1200], order[1200:]
label = y.clone()
wrong = train[torch.rand(len(train)) < 0.1]
label[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape)) % 10


class Block(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x):  # [n, channels, 8, 8]
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(h)))


def resnet(norm, channels=16):
    stem = nn.Conv2d(1, channels, 3, padding=1, bias=False), norm(channels), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 10)
    return nn.Sequential(*stem, Block(channels, norm), Block(channels, norm), *head)


def freeze_norms(model):
    """Batch norms keep their statistics; to be called after each ``model.train()``."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


def epoch(model, optimizer, announce=lambda ids: None):
    for ids in train[torch.randperm(len(train))].split(50):
        announce(ids)
        F.cross_entropy(model(x[ids]), label[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()


for name, norm in (("frozen batch norms", nn.BatchNorm2d), ("group norms", lambda channels: nn.GroupNorm(4, channels))):
    model = resnet(norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if norm is nn.BatchNorm2d:
        epoch(model, optimizer)
    freeze_norms(model)
    with adam_ghost.InRun(model, optimizer, lambda model=model: F.cross_entropy(model(x[val]), y[val]), every=2) as run:
        for _ in range(3):
            epoch(model, optimizer, run.batch)
    with torch.no_grad():
        right = (model(x[val]).argmax(1) == y[val]).double().mean()
    scores = dict(zip(run.scores().ids, run.scores().standardized, strict=True))
    value = torch.tensor([scores.get(i, 0.0) for i in train.tolist()])
    bad = label[train] != y[train]
    auroc = (value[bad][:, None] < value[~bad]).double().mean()
    coverage = run.steps[-1].coverage
    print(
        f"{name}: accuracy {right:.1%}; coverage {coverage:.0%} of the parameters; AUROC of low scores for wrong labels {auroc:.2f}"
    )
