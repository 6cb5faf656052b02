"""Which rule is right depends on the optimizer: gradient dot products are exact for SGD, and for SGD alone.

    python examples/sgd_is_exact.py

Trains the same small network on handwritten digits by SGD with momentum, by AdamW, and by Muon and AdamW together. At one step
of each, scores by ``rule="sgd"`` (dot products of gradients, arXiv 2406.11011) and by the optimizer's own rule are compared with
the exact Shapley values of the step that the optimizer really takes. Muon's step couples the elements of a matrix, so that 64
samples are few for it: its own rule is far nearer than dot products, and not exact (docs/optimizers.md).
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import adam_ghost

STEP = 20

digits = load_digits()
x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)  # float64, in which small differences of losses show


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def muon_and_adamw(model):
    matrices = [model[0].weight]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW([model[0].bias, *model[2].parameters()], lr=1e-3)]


trainings = {
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "Muon and AdamW": muon_and_adamw,
}
for name, make in trainings.items():
    model = network()
    made = make(model)
    cache = adam_ghost.LayerCache(model, lambda model=model: F.cross_entropy(model(x[1500:]), y[1500:]))
    for step in range(1, STEP + 1):
        batch = slice(64 * step, 64 * step + 64)
        with cache:
            F.cross_entropy(model(x[batch]), y[batch]).backward()
        if step == STEP:
            truth = adam_ghost.exact_shapley(cache, made, permutations=8)
            for rule, shown in (("sgd", "dot products"), (None, "its own rule")):
                r, error = truth.compare(adam_ghost.attribute(cache, made, rule=rule))
                print(f"{name:15} {shown:12}  R {r:.4f}  relative error {error:.3f}")
        for optimizer in made if isinstance(made, list) else [made]:
            optimizer.step()
            optimizer.zero_grad()
