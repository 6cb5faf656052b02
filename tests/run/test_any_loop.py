"""Loops drawn at random, against books kept by hand: Adam on a linear model, in NumPy, by the definitions."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import adam_ghost as ag

LR, BETA1, BETA2, EPS, CLIP = 0.05, 0.9, 0.999, 1e-8, 0.3
G = np.random.default_rng(0)
INPUTS, TARGETS = G.normal(size=(6, 2)), G.normal(size=(6, 3))
VAL_INPUTS, VAL_TARGETS = G.normal(size=(4, 2)), G.normal(size=(4, 3))


@dataclass(frozen=True)
class Step:
    batches: tuple[tuple[int, ...], ...]  # the samples of each micro-batch
    cleared: str  # when the gradients of the step before go
    to_none: bool
    end: str
    clip: bool
    freeze: bool  # the bias changes sides
    resume: bool  # before the step, from a checkpoint


steps = st.builds(
    Step,
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=2).map(tuple),
    st.sampled_from(["before", "after batch", "after forward"]),
    st.booleans(),
    st.sampled_from(["step", "step", "step", "skip", "overflow", "no backward"]),
    st.booleans(),
    st.sampled_from([False, False, True]),
    st.sampled_from([False, False, True]),
)


class Oracle:
    """Adam's step with the last column as the bias, and what each sample's gradient does to the validation loss in it."""

    def __init__(self, weight, bias):
        self.w = np.concatenate([weight, bias[:, None]], 1)  # [3, 3]
        self.m, self.v, self.t = np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3)
        self.trained = np.ones(3)
        self.totals, self.counts = {}, {}

    @staticmethod
    def residual(w, x, y):
        return w @ np.append(x, 1.0) - y

    def gradient(self, i, n, weight):
        """A sample's share, of a loss that is the mean over ``n`` samples, times ``weight``."""
        return np.outer(self.residual(self.w, INPUTS[i], TARGETS[i]), np.append(INPUTS[i], 1.0)) * weight / n * self.trained

    def after(self, g):
        t = np.maximum(self.t + self.trained, 1)
        m, v = BETA1 * self.m + (1 - BETA1) * g, BETA2 * self.v + (1 - BETA2) * g**2
        moved = LR * (m / (1 - BETA1**t)) / (np.sqrt(v / (1 - BETA2**t)) + EPS)
        return self.w - moved * self.trained, m, v

    def step(self, shares, clip):
        g = sum(share for _, share in shares)
        factor = min(1.0, CLIP / (np.sqrt((g**2).sum()) + 1e-6)) if clip else 1.0
        g = g * factor
        empty, (full, m, v) = self.after(np.zeros_like(g))[0], self.after(g)
        mid = (empty + full) / 2
        pairs = zip(VAL_INPUTS, VAL_TARGETS, strict=True)
        val = sum(np.outer(self.residual(mid, x, y), np.append(x, 1.0)) for x, y in pairs) / len(VAL_INPUTS)
        P = val * np.divide(empty - full, g, out=np.zeros_like(g), where=g != 0)
        for i, share in shares:
            self.totals[i] = self.totals.get(i, 0.0) + float((P * share * factor).sum())
            self.counts[i] = self.counts.get(i, 0) + 1
        keep = self.trained == 0
        self.w, self.t = full, self.t + self.trained
        self.m, self.v = np.where(keep, self.m, m), np.where(keep, self.v, v)


def half_squares(model, x, y):
    return (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().sum() / 2 / len(x)


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.lists(steps, min_size=1, max_size=4))
def test_totals_are_those_of_books_kept_by_hand(sequence):
    torch.manual_seed(0)
    model = nn.Linear(2, 3).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(BETA1, BETA2), eps=EPS, foreach=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    oracle = Oracle(model.weight.detach().numpy().copy(), model.bias.detach().numpy().copy())
    build = lambda: ag.InRun(model, optimizer, lambda: half_squares(model, VAL_INPUTS, VAL_TARGETS), strict=True)  # noqa: E731
    run = build()
    for step in sequence:
        run = one_step(step, run, build, model, optimizer, scaler, oracle)
    run.close()
    found = run.scores()
    assert dict(zip(found.ids, found.steps, strict=True)) == oracle.counts
    want = [oracle.totals[i] for i in found.ids]
    np.testing.assert_allclose(found.total, want, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(model.weight.detach().numpy(), oracle.w[:, :2], rtol=1e-9)


def one_step(step, run, build, model, optimizer, scaler, oracle):
    if step.resume:
        state = run.state_dict()
        run.close()
        run = build()
        run.load_state_dict(state)
    if step.freeze:
        optimizer.zero_grad(step.to_none)
        model.bias.requires_grad_(not model.bias.requires_grad)
        model.bias.grad = None
        oracle.trained[2] = model.bias.requires_grad
    if step.cleared == "before":
        optimizer.zero_grad(step.to_none)
    shares, n = [], len(step.batches)
    for k, ids in enumerate(step.batches):
        run.batch(ids)
        if k == 0 and step.cleared == "after batch":
            optimizer.zero_grad(step.to_none)
        loss = half_squares(model, INPUTS[list(ids)], TARGETS[list(ids)]) / n
        if k == 0 and step.cleared == "after forward":
            optimizer.zero_grad(step.to_none)
        if step.end == "no backward" and k == n - 1:
            return run
        scaler.scale(loss * (float("inf") if step.end == "overflow" and k == n - 1 else 1)).backward()
        shares += [(i, oracle.gradient(i, len(ids), 1 / n)) for i in ids]
    if step.end == "skip":
        return run
    if step.clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], CLIP)
    scaler.step(optimizer)
    scaler.update()
    if step.end == "step":
        oracle.step(shares, step.clip)
    return run
