"""The books of a run close: what the batches' steps and history took off adds up to what the validation loss lost."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost import AdamState


def problem():
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 64, generator=g)
    y = torch.randint(0, 10, (900,), generator=g)
    x = centres[y] + 1.5 * torch.randn(900, 64, generator=g)
    torch.manual_seed(1)
    return x, y, nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(lr, steps, schedule, watch=lambda run, model, optimizer: None, stop=None, resumed=None, **options):
    """The loss before and after ``steps`` steps, and the run."""
    x, y, model = problem()
    val = lambda: F.cross_entropy(model(x[600:]), y[600:])  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    before = float(val().detach())
    run = ag.InRun(model, optimizer, val, schedule, **options)
    order = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(0, 600, (32,), generator=order)
        run.batch(ids)
        F.cross_entropy(model(x[ids]), y[ids]).backward()
        watch(run, model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return before - float(val().detach()), run


@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead"])
@pytest.mark.parametrize(("lr", "steps", "allowed"), [(1e-3, 250, 0.03), (1e-2, 400, 0.05)])
def test_scores_and_history_are_the_drop(schedule, lr, steps, allowed):
    drop, run = train(lr, steps, schedule)
    booked = sum(s.score_sum[0] + s.history[0] for s in run.steps)
    assert abs(drop) > 0.1
    assert abs(booked - drop) <= allowed * abs(drop), f"{booked} of {drop}"


def test_history_is_what_the_step_without_the_batch_takes_off():
    """Step by step, against two evaluations; to first order at the midpoint it is off by half of the curvature's share."""
    exact = []

    def watch(run, model, optimizer):
        state, params = AdamState.of(optimizer), list(model.parameters())
        held = [p.detach().clone() for p in params]
        here = float(run._loop.validation.loss())
        with torch.no_grad():
            for p in params:
                p.data.copy_(state.empty_weights(p))
        exact.append(here - float(run._loop.validation.loss()))
        for p, w in zip(params, held, strict=True):
            p.data.copy_(w)

    _, run = train(3e-3, 60, "midpoint", watch)
    booked = torch.tensor([s.history[0] for s in run.steps])[10:]
    want = torch.tensor(exact)[10:]
    assert (booked - want).norm() <= 0.1 * want.norm()
    assert math.isclose(booked.sum(), want.sum(), rel_tol=0.02)


def test_skipped_steps_and_resumed_runs_go_on():
    def run_of(model, x, y, optimizer):
        return ag.InRun(model, optimizer, lambda: F.cross_entropy(model(x[600:]), y[600:]))

    def loop(run, model, optimizer, x, y, steps):
        for step in steps:
            run.batch(range(32))
            F.cross_entropy(model(x[step : step + 32]), y[step : step + 32]).backward()
            if step != 5:
                optimizer.step()
            optimizer.zero_grad()

    whole, parts = [], []
    for found, cuts in ((whole, (0, 12)), (parts, (0, 6, 12))):
        x, y, model = problem()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        state = None
        for start, end in pairwise(cuts):
            with run_of(model, x, y, optimizer) as run:
                if state:
                    run.load_state_dict(state)
                loop(run, model, optimizer, x, y, range(start, end))
                state = run.state_dict()
        found += [s.history[0] for s in run.steps if not s.skipped]
    assert len(whole) == 11
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(parts))
