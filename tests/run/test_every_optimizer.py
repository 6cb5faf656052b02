"""A training by any optimizer: a step's scores against steps really taken, a window's against training on with other weights."""

import pytest
import torch
from oracles import Problem, close, gradients_one_by_one, inner
from torch import nn
from trainings import mlp, points, sample_losses

import adam_ghost as ag

pytestmark = pytest.mark.usefixtures("float64")

O = torch.optim
N = 6
KINDS = {
    "SGD": lambda ps: O.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "RMSprop": lambda ps: O.RMSprop(ps, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "Adagrad": lambda ps: O.Adagrad(ps, lr=0.1, initial_accumulator_value=0.1),
    "Adamax": lambda ps: O.Adamax(ps, lr=0.02),
    "NAdam": lambda ps: O.NAdam(ps, lr=0.01),
    "RAdam": lambda ps: O.RAdam(ps, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adafactor": lambda ps: O.Adafactor(ps, lr=0.02),
}
COUPLED = ("Adafactor",)
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def matrix_and_rest(model):
    """Muon and AdamW, as speed runs share a model out."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return O.Muon(matrices, lr=0.02), O.AdamW(rest, lr=0.01)


@pytest.mark.parametrize("make", [m for k, m in KINDS.items() if k not in COUPLED], ids=[k for k in KINDS if k not in COUPLED])
def test_thin_layer(make):
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    x, val = torch.randn(2, N, 3, 5)
    case = Problem(model, (x,), (val,), optimizer=make(model.parameters())).warm(7).record()
    P = case.direction()
    # the oracle's quotients lose digits where an element of the gradient is small
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]), 1e-8)
    assert ag.gram(case.cache, case.optimizer).shape == (N, N)


class Loop:
    """A training whose samples have weights in its loss."""

    def __init__(self, make, weights=None):
        torch.manual_seed(5)
        self.model = mlp()
        made = make(self.model.parameters()) if make is not matrix_and_rest else make(self.model)
        self.optimizers = list(made) if isinstance(made, tuple) else [made]
        self.weights = torch.ones(20, N) if weights is None else weights
        self.run, self.number = None, 0

    def val_loss(self):
        x, y = points(900, 9)
        return sample_losses(self.model(x), y).mean()

    def train_loss(self, batch):
        number, x, y = batch
        return (sample_losses(self.model(x), y) * self.weights[number]).mean()

    def train(self, steps):
        for _ in range(steps):
            batch = (self.number, *points(self.number, N))
            if self.run:
                self.run.batch([f"{self.number}.{i}" for i in range(N)], inputs=batch)
            self.train_loss(batch).backward()
            for each in self.optimizers:
                each.step()
                each.zero_grad()
            self.number += 1
        return self


@pytest.mark.filterwarnings("ignore:adam_ghost. the credit of steps", "ignore:adam_ghost. the run ended")
@every_kind
def test_window(make):
    """Credit is the derivative of the loss at the window's end by the samples' weights: differences of whole trainings."""
    steps, first, h = 16, 12, 1e-5
    loop = Loop(make)
    loop.train(first)
    loop.run = ag.InRun(
        loop.model,
        loop.optimizers,
        loop.val_loss,
        "window",
        window=2,
        ahead=2,
        bounded=False,
        feedback="double",
        train_loss=loop.train_loss,
    )
    loop.train(4)
    found = torch.from_numpy(loop.run.scores().total).reshape(2, N)
    loop.run.close()
    for step, sample in ((0, 0), (0, 3), (1, 2), (1, 5)):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(20, N)
            weights[first + step, sample] += sign * h
            ends.append(Loop(make, weights).train(steps).val_loss().item())
        want = -(ends[0] - ends[1]) / (2 * h)
        assert abs(found[step, sample] - want) <= 1e-6 * found.abs().max()


@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead"])
@pytest.mark.parametrize("make", [*KINDS.values(), matrix_and_rest], ids=[*KINDS, "Muon and AdamW"])
def test_running_layer(make, schedule):
    """The scores are those of the thin layer, whose places and rules these are; in lookahead ``P`` is foreseen."""
    loop, alone = Loop(make), Loop(make)
    loop.train(11)
    alone.train(11)
    loop.run = ag.InRun(loop.model, loop.optimizers, loop.val_loss, schedule, strict=True)
    cache = ag.LayerCache(alone.model, alone.val_loss, strict=True)
    loop.train(1)
    with cache:
        alone.train_loss((11, *points(11, N))).backward()
    # SGD's P asks no gradient, and its state tells no history: it goes the midpoint's way for ten steps
    place = "midpoint" if schedule == "lookahead" and make is KINDS["SGD"] else schedule
    found, want = torch.from_numpy(loop.run.scores().total), ag.attribute(cache, alone.optimizers, at=place)
    if place == "lookahead":
        # a small matrix' orthogonal one turns with a gradient that nothing foretells
        assert torch.corrcoef(torch.stack([found, want]))[0, 1] > (0.5 if make is matrix_and_rest else 0.97)
    else:
        close(found, want, 1e-10)
