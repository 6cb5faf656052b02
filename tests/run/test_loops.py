"""Loops in every order that people write: what a step did not use is in no score, and nothing is wrong in silence."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn import functional as F

import adam_ghost as ag

N, STEPS = 4, 15
SCHEDULES = pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead"])


def data(seed, n=N):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)


def val_loss(model):
    x, y = data(99, 8)
    return F.cross_entropy(model(x), y)


def build(schedule="midpoint", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, ag.InRun(model, optimizer, lambda: val_loss(model), schedule, **options)


def loss_of(model, step):
    x, y = data(step)
    return F.cross_entropy(model(x), y)


def without(schedule, left_out, **options):
    """The totals of a loop that never sees the steps left out, by id."""
    model, optimizer, run = build(schedule, **options)
    for step in set(range(STEPS)) - left_out:
        run.batch([f"{step}.{i}" for i in range(N)])
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return dict(zip(run.scores().ids, run.scores().total, strict=True))


def assert_same(run, expected, rtol=1e-5):
    found = dict(zip(run.scores().ids, run.scores().total, strict=True))
    assert found.keys() == expected.keys()
    scale = max(map(abs, expected.values()))
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=rtol, atol=rtol * scale)


@SCHEDULES
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
@pytest.mark.parametrize("order", ["batch, zero_grad", "batch, forward, zero_grad", "zero_grad, batch", "at the end"])
@pytest.mark.parametrize("how", ["overflow", "spike", "no backward", "no forward"])
def test_skipped_steps(schedule, order, how, to_none):
    """Two steps in a row are skipped: by a scaler, by the loop after the backward pass, before it, before the forward pass."""
    model, optimizer, run = build(schedule)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6, enabled=how == "overflow")
    bad = {3, 4, 12}
    for step in range(STEPS):
        if order == "zero_grad, batch":
            optimizer.zero_grad(to_none)
        run.batch([f"{step}.{i}" for i in range(N)])
        if order == "batch, zero_grad":
            optimizer.zero_grad(to_none)
        if step in bad and how == "no forward":
            continue
        loss = loss_of(model, step)
        if order == "batch, forward, zero_grad":
            optimizer.zero_grad(to_none)
        if step in bad and how == "no backward":
            continue
        scaler.scale(loss * (float("inf") if step in bad and how == "overflow" else 1)).backward()
        if not (step in bad and how == "spike"):
            scaler.step(optimizer)
            scaler.update()
        if order == "at the end":
            optimizer.zero_grad(to_none)
    run.close()
    assert_same(run, without(schedule, bad))
    assert np.isfinite(run.scores().standardized).all()
    assert sum(s.samples for s in run.steps if not s.skipped) == (STEPS - len(bad)) * N
    assert sum(s.samples for s in run.steps if s.skipped) == (0 if how == "no forward" else len(bad) * N)


@SCHEDULES
def test_accumulation_after_a_skipped_step(schedule):
    """Its micro-batches are gone when gradients first arrive on cleared ones, and those that follow are added up."""
    model, optimizer, run = build(schedule)
    for step in range(STEPS):
        for k in range(2):
            run.batch([f"{step}.{k}.{i}" for i in range(N)])
            if k == 0:
                optimizer.zero_grad()
            (loss_of(model, 2 * step + k) / 2).backward()
        if step % 3 != 1:
            optimizer.step()
    other, other_optimizer, expected = build(schedule)
    for step in range(STEPS):
        if step % 3 != 1:
            for k in range(2):
                expected.batch([f"{step}.{k}.{i}" for i in range(N)])
                (loss_of(other, 2 * step + k) / 2).backward()
            other_optimizer.step()
            other_optimizer.zero_grad()
    assert_same(run, dict(zip(expected.scores().ids, expected.scores().total, strict=True)))
    for s in run.steps:
        assert s.skipped or math.isclose(s.score_sum[0], s.total[0], rel_tol=1e-3, abs_tol=1e-7)


def test_gradients_cleared_out_of_autograds_sight():
    model, optimizer, run = build()
    for step in range(4):
        run.batch([f"{step}.{i}" for i in range(N)])
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.zero_()
        loss_of(model, step).backward()
        if step != 1:
            optimizer.step()
    assert not any(str(i).startswith("1.") for i in run.scores().ids)


@SCHEDULES
def test_scores_that_are_not_finite_enter_nothing(schedule):
    model, optimizer, run = build(schedule)
    bad = False
    run._loop.validation.val_loss = lambda: val_loss(model) + bad * (model[0].weight.sum() - model[0].weight.sum().detach()) * 1e38
    with pytest.warns(UserWarning, match="adam_ghost: step 13 is left out: its scores are not finite"):
        for step in range(STEPS):
            bad = 1e30 if step == 12 else 0
            run.batch([f"{step}.{i}" for i in range(N)])
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert np.isfinite(run.scores().total).all() and len(run.scores().ids) == (STEPS - 1) * N
    assert [s.step for s in run.steps if s.skipped] == [13]


def test_a_hook_that_clips_after_the_run_has_looked():
    model, optimizer, run = build()
    optimizer.register_step_pre_hook(lambda *args: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    run.batch(range(N))
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"gradients were changed after the run had scored them.*hook"):
        optimizer.step()
    assert run.scores().ids == [] and len(run.steps) == 0


def test_a_hook_that_clips_before():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_pre_hook(lambda *args: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None)
    with ag.InRun(model, optimizer, lambda: val_loss(model), strict=True) as run:
        run.batch(range(N))
        loss_of(model, 0).backward()
        optimizer.step()
    assert len(run.steps) == 1


@SCHEDULES
def test_a_step_that_only_makes_the_optimizers_state(schedule):
    """As torch.distributed.checkpoint takes, to load the state into an optimizer that has none."""
    model, optimizer, run = build(schedule)
    get_state_dict(model, optimizer)
    assert optimizer.state and run.step == 0
    run.batch(["a", "b", "c", "d"])
    loss_of(model, 0).backward()
    optimizer.step()
    assert run.step == 1 and set(run.scores().ids) == {"a", "b", "c", "d"}
    run.close()


def test_a_first_step_of_a_warm_up_is_one_of_training():
    """With a learning rate of zero; it differs from the checkpoint's by its gradients."""
    model, optimizer, run = build()
    optimizer.param_groups[0]["lr"] = 0.0
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="without a recorded forward pass"):
        optimizer.step()
    run.close()
