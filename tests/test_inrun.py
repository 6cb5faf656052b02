"""InRun in real loops: its scores are those of the very gradient that the optimizer used, and training stays what it was.

The oracle recomputes each sample's share of the loss under the same random numbers and differentiates it alone.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adam_ghost as ag
from adam_ghost.demo.model import GPT
from adam_ghost.direction import form_direction, validation_gradient
from adam_ghost.state import AdamState

VOCABULARY, CONTEXT, N = 19, 8, 6
SCHEDULES = pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])


def gpt(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    return GPT(VOCABULARY, CONTEXT, 2, 16, 2, dropout).to(dtype)


def tokens(n=N, length=CONTEXT + 1, seed=1):
    return torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def mean_shares(model, x):
    """[n]: each sample's share of the mean loss."""
    losses = F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none")
    return losses.mean(1) / len(x)


def val_loss(model):
    return mean_shares(model, tokens(4, seed=9)).sum()


class Loop:
    """A training loop with InRun, and beside it, per step, the oracle's scores."""

    def __init__(self, model, schedule="midpoint", val=val_loss, scaler=None, optimizer=None, **options):
        self.model, self.schedule, self.scaler = model, schedule, scaler
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(params, lr=3e-3)
        self.val = partial(val, model)
        self.expected, self.shares, self.factor = [], [], 1.0
        self.optimizer.register_step_pre_hook(self.oracle)
        self.run = ag.InRun(model, self.optimizer, self.val, schedule, **options)

    def backward(self, shares, ids, offsets=None, **context):
        seed = len(self.shares)
        self.run.batch(ids, offsets)
        torch.manual_seed(seed)
        loss = shares(self.model).sum()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.shares.append((shares, seed, ids))

    def step(self):
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.shares = []

    def oracle(self, optimizer, args, kwargs):
        params = [p for p in self.model.parameters() if p.grad is not None]
        grads = [p.grad.clone() for p in params]
        if self.schedule == "midpoint":
            state = AdamState.of(optimizer)
            run = ag.inrun.Validation(self.val, self.model)
            val = validation_gradient(state, params, grads, run, "midpoint")
            P = form_direction(state, params, grads, val, "secant").P
        else:
            P = {k: x.clone() for k, x in self.run._direction.P.items()}
        found = {}
        recording, self.run._recorder.recording = self.run._recorder.recording, None
        with torch.random.fork_rng():
            for shares, seed, ids in self.shares:
                torch.manual_seed(seed)
                with torch.enable_grad():
                    parts = shares(self.model)
                for i, part in zip(ids, parts, strict=True):
                    gs = torch.autograd.grad(part, params, retain_graph=True, allow_unused=True)
                    score = sum((P[id(p)] * g).sum() for p, g in zip(params, gs, strict=True) if g is not None)
                    found[i] = found.get(i, 0.0) + float(score * self.factor)
        self.run._recorder.recording = recording
        self.expected.append(found)

    def check(self, tolerance=1e-10):
        got = self.run.scores()
        want = {}
        for step in self.expected:
            for i, s in step.items():
                want[i] = want.get(i, 0.0) + s
        assert got.ids == list(want)
        np.testing.assert_allclose(got.total, list(want.values()), atol=tolerance * np.linalg.norm(list(want.values())), rtol=0)


@SCHEDULES
def test_plain(schedule):
    loop = Loop(gpt(), schedule)
    for step in range(4):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        loop.step()
    loop.check()
    assert [s.step for s in loop.run.steps] == [1, 2, 3, 4]
    for s in loop.run.steps:
        np.testing.assert_allclose(s.score_sum, s.total, rtol=1e-9)


@SCHEDULES
def test_accumulation_over_micro_batches_of_different_sizes(schedule):
    loop = Loop(gpt(), schedule)
    for step in range(3):
        for k, n in enumerate((4, 1, 3)):
            loop.backward(lambda m, n=n, k=k, s=step: mean_shares(m, tokens(n, seed=10 * s + k)) / 3, [f"{k}.{i}" for i in range(n)])
        loop.step()
    loop.check()


@SCHEDULES
@pytest.mark.parametrize("how", ["clip", "scale"])
def test_gradient_scaled_between_backward_and_step(schedule, how):
    loop = Loop(gpt(), schedule)
    for step in range(3):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        if how == "clip":
            norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
            loop.factor = float(min(1.0, 0.05 / (norm + 1e-6)))
            assert loop.factor < 0.5
        else:
            loop.factor = 0.25
            for p in loop.model.parameters():
                p.grad = p.grad * 0.25
        loop.step()
    loop.check()
