"""Finds mislabelled training images: scikit-learn's digits, of which one in ten gets a wrong label.

    python examples/mislabelled_digits.py

Trains a small network with AdamW and credits every sample with what it did over windows of steps: the lowest are suspects.
The default ranking standardises credit within steps; its plain sum, which the first steps dominate, is printed too. The
samples' own training losses, summed over the training, are the baseline that costs nothing, and are printed beside them.
"""

import argparse
import struct
import zlib

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import adam_ghost

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--ledger", default="runs/digits")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, val = order[:1400], order[1400:]
label = y.clone()
wrong = train[torch.rand(len(train)) < 0.1]
label[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape)) % 10


def png(pixels):
    """Eight by eight grey values as a PNG, for the report."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = b"".join(b"\0" + bytes(int(255 * v) for v in line) for line in pixels.view(8, 8))
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def describe(i):
    return {"group": f"labelled {label[i]}", "text": f"a {y[i]}, labelled {label[i]}", "image": png(x[i])}


model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
summed_loss = torch.zeros(len(x))


def loss_of(ids):
    return F.cross_entropy(model(x[ids]), label[ids])


ledger = adam_ghost.LedgerWriter(options.ledger, describe=describe, restart=True)
windows = {"window": 30, "ahead": 30, "train_loss": loss_of}
with adam_ghost.InRun(model, optimizer, lambda: F.cross_entropy(model(x[val]), y[val]), "window", ledger=ledger, **windows) as run:
    for epoch in range(options.epochs):
        run.epoch = epoch
        for ids in train[torch.randperm(len(train))].split(50):
            run.batch(ids, inputs=ids)  # what loss_of takes, to run the batch again
            losses = F.cross_entropy(model(x[ids]), label[ids], reduction="none")
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            summed_loss[ids] += losses.detach()

bad = label[train] != y[train]


def tell(name, suspicion):
    """How well ``suspicion``, one number per training sample, tells the wrong labels from the others."""
    auroc = (suspicion[bad][:, None] > suspicion[~bad]).double().mean()
    k = int(bad.sum())
    found = int(bad[suspicion.argsort(descending=True)[:k]].sum())
    print(f"{name:24} AUROC {auroc:.3f}; of the {k} most suspicious {found} are mislabelled: {found / k:.0%}")


print(f"{int(bad.sum())} of {len(train)} labels are wrong")
with adam_ghost.open_ledger(options.ledger) as read:
    for name, value in (("windows, standardised:", "standardized"), ("windows, summed:", "total")):
        credit = {row["sample"]: row["value"] for row in read.totals(value=value).to_pylist()}
        tell(name, -torch.tensor([credit[i] for i in train.tolist()]))
tell("summed training loss:", summed_loss[train])
print(f"more: adam-ghost report {options.ledger}")
