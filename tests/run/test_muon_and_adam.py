"""A GPT whose matrices Muon steps and whose rest AdamW steps, with accumulation and clipping: scores of the very step."""

import copy

import numpy as np
import pytest
import torch
from oracles import close
from torch import nn
from toys.muon_and_adam import MuonAndAdam
from trainings import gpt, sample_losses, texts

import adam_ghost as ag
from adam_ghost.optim import read_optimizer
from adam_ghost.optim.muon import MuonState

pytestmark = pytest.mark.usefixtures("float64")

PARTS, MAX_NORM = (4, 2), 0.3
GAUSS = (0.5 - 12**-0.5, 0.5 + 12**-0.5)  # points of the two-point rule
# of the 16-point rule: where, how much
PATH = tuple(((1 + x) / 2, weight / 2) for x, weight in zip(*np.polynomial.legendre.leggauss(16), strict=True))


def shared_out(model):
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    return matrices, [p for p in model.parameters() if all(p is not q for q in matrices)]


def two(model):
    matrices, rest = shared_out(model)
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)]


def one_class(model):
    return [MuonAndAdam(*shared_out(model))]


class Loop:
    def __init__(self, make, weights=None):
        self.model = gpt()
        self.optimizers = make(self.model)
        self.weights = torch.ones(20, sum(PARTS)) if weights is None else weights
        self.run, self.number = None, 0

    def val_loss(self):
        x, y = texts(900, 9)
        return sample_losses(self.model(x), y).mean()

    def micro(self):
        start = 0
        for m, n in enumerate(PARTS):
            yield self.number, slice(start, start + n), *texts(1000 * self.number + m, n)
            start += n

    def train_loss(self, batch):
        number, rows, x, y = batch
        return (sample_losses(self.model(x), y) * self.weights[number, rows]).sum() / sum(PARTS)

    def backward(self):
        for batch in self.micro():
            if self.run is not None:
                self.run.batch([f"{self.number}.{i}" for i in range(batch[1].start, batch[1].stop)], inputs=batch)
            self.train_loss(batch).backward()
        return nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)

    def train(self, steps):
        for _ in range(steps):
            assert self.backward() > MAX_NORM
            for each in self.optimizers:
                each.step()
                each.zero_grad()
            self.number += 1
        return self

    # the oracle's

    def gradients(self, loss):
        params = list(self.model.parameters())
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True)
        ]

    def stepped(self, grads, scale):
        """The weights after the optimizers' own steps, on copies."""
        model, optimizers = copy.deepcopy((self.model, self.optimizers))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g * scale
        for each in optimizers:
            each.step()
        return [p.detach() for p in model.parameters()]

    def val_gradient(self, weights):
        held = [p.detach().clone() for p in self.model.parameters()]
        for p, w in zip(self.model.parameters(), weights, strict=True):
            p.data.copy_(w)
        found = self.gradients(self.val_loss())
        for p, w in zip(self.model.parameters(), held, strict=True):
            p.data.copy_(w)
        return found


def muon_matrix(x):
    x = x.mT if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def direction(loop, grads, val):
    """Of each parameter: of AdamW's the quotient of real steps, of Muon's the path's integral."""
    (muon, _), (empty, full) = loop.optimizers, (loop.stepped(grads, scale) for scale in (0.0, 1.0))
    found = []
    for p, g, v, e, f in zip(loop.model.parameters(), grads, val, empty, full, strict=True):
        if p not in muon.state:
            found.append(v * torch.where(g == 0, 0.0, (e - f) / torch.where(g == 0, 1.0, g)))
            continue
        buffer, tall = muon.state[p]["momentum_buffer"], p.shape[0] > p.shape[1]

        def step(x, buffer=buffer, tall=tall, p=p):
            x = muon_matrix(0.05 * x + 0.95 * (0.95 * buffer + 0.05 * x))
            return 0.02 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * (x.mT if tall else x)

        found.append(sum(weight * torch.func.vjp(step, at * g)[1](v)[0] for at, weight in PATH))
    return found


@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead"])
def test_scores_are_those_of_the_very_step(schedule):
    loop = Loop(two).train(11)
    loop.run = ag.InRun(loop.model, loop.optimizers, loop.val_loss, schedule, strict=True)
    alone = copy.deepcopy(loop.model), copy.deepcopy([each.state_dict() for each in loop.optimizers])
    oracle = Loop(two)
    oracle.model, oracle.number = alone[0], 11
    oracle.optimizers = two(oracle.model)
    for each, held in zip(oracle.optimizers, alone[1], strict=True):
        each.load_state_dict(held)
    norm = oracle.backward()
    grads = [p.grad.clone() for p in oracle.model.parameters()]
    for p in oracle.model.parameters():
        p.grad = None
    empty, full = (oracle.stepped(grads, scale) for scale in (0.0, 1.0))
    between = lambda t: [e + t * (f - e) for e, f in zip(empty, full, strict=True)]  # noqa: E731
    if schedule == "lookahead":
        state = read_optimizer(oracle.optimizers)
        expected = [state.expected_gradient(p) for p in oracle.model.parameters()]
        P = direction(oracle, expected, oracle.val_gradient(empty))
    else:
        points = (0.5,) if schedule == "midpoint" else GAUSS
        vals = [oracle.val_gradient(between(t)) for t in points]
        P = direction(oracle, grads, [sum(v) / len(points) for v in zip(*vals, strict=True)])
    want = []
    for _, _, x, y in oracle.micro():
        for share in sample_losses(oracle.model(x), y) / sum(PARTS) * (MAX_NORM / (norm + 1e-6)):
            params = list(oracle.model.parameters())
            shares = torch.autograd.grad(share, params, retain_graph=True, allow_unused=True)
            want.append(sum((d * g).sum() for d, g in zip(P, shares, strict=True) if g is not None))
    loop.train(1)
    # the oracle's quotients lose digits where an element of the gradient is small
    close(torch.from_numpy(loop.run.scores().total), torch.stack(want).detach(), 1e-7)


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize("make", [two, one_class], ids=["two", "one-class"])
def test_window_is_the_derivative_of_the_training(make, monkeypatch):
    """Of trainings whose iterations are not rounded to bfloat16, in which small differences would drown."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())  # as Muon calls it, and, from torch 2.15 on:
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *args, **how: x.clone() if "copy" in how else to(x, *args, **how))
    monkeypatch.setattr(
        MuonState, "moved", staticmethod(lambda s, w, *rest, moved=MuonState.moved: moved(s._replace(dtype=w.dtype), w, *rest))
    )
    steps, first, h = 16, 12, 1e-5
    loop = Loop(make).train(first)
    given = loop.optimizers if len(loop.optimizers) > 1 else loop.optimizers[0]
    options = {"window": 2, "ahead": 2, "bounded": False, "feedback": "double", "train_loss": loop.train_loss}
    loop.run = ag.InRun(loop.model, given, loop.val_loss, "window", strict=True, **options)
    loop.train(4)
    found = torch.from_numpy(loop.run.scores().total).reshape(-1, sum(PARTS))[:2]
    loop.run.close()
    for step, sample in ((0, 0), (0, 4), (1, 2), (1, 5)):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(20, sum(PARTS))
            weights[first + step, sample] += sign * h
            ends.append(Loop(make, weights).train(steps).val_loss().item())
        want = -(ends[0] - ends[1]) / (2 * h)
        assert abs(found[step, sample] - want) <= 1e-6 * found.abs().max()
