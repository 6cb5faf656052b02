"""``schedule="window"``: scores are the derivative through the whole window, and training stays what it was."""

import random
import warnings

import numpy as np
import pytest
import torch
from snapshots import everything, residue, same
from torch import nn
from trainings import Sometimes, Training, apart, conv, gpt, mlp, pictures, points, texts

import adam_ghost as ag

EXACT = 1e-9  # float64, a few dozen steps of arithmetic, differences of large numbers among them


def adam(kind=torch.optim.AdamW, **options):
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2} | options)


def groups(model):
    head = {"params": list(model[-1].parameters()), "lr": 3e-2, "betas": (0.7, 0.95), "weight_decay": 0.3}
    return torch.optim.Adam([{"params": list(model[:-1].parameters())}, head], lr=1e-2)


OPTIONS = {
    "AdamW": adam(),
    "Adam": adam(torch.optim.Adam),
    "Adam-decay": adam(torch.optim.Adam, weight_decay=0.2),
    "AdamW-decay": adam(weight_decay=0.5),
    "amsgrad": adam(amsgrad=True, betas=(0.8, 0.6)),
    "maximize": adam(maximize=True, weight_decay=0.1),
    "all": adam(torch.optim.Adam, maximize=True, amsgrad=True, weight_decay=0.1, betas=(0.8, 0.6)),
    "betas": adam(betas=(0.5, 0.9), eps=1e-3),
    "single": adam(foreach=False, capturable=False),
    "foreach": adam(foreach=True),
    "fused": adam(fused=True),
    "tensor-lr": adam(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "groups": groups,
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_optimizer(make):
    training = Training(mlp(), make).attach().train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


@pytest.mark.parametrize("feedback", ["double", "forward"])
@pytest.mark.parametrize("model, data", [(mlp, None), (gpt, texts), (conv, pictures)], ids=["mlp", "gpt", "conv"])
def test_every_model_and_exact_feedback(model, data, feedback):
    training = Training(model(), adam(), **{"data": data} if data else {}).attach(feedback=feedback).train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


def test_differences_of_gradients(monkeypatch):
    training = Training(gpt(), adam(), data=texts).attach(feedback="differences").train(6)
    want = training.credit(1, 4, 6)
    assert apart(training.scores(), want) <= 1e-3
    assert apart(training.credit(1, 4, 6, "none"), want) > 0.02  # there is something to be told
    # the error is of first order in the step, until rounding in float64 takes over
    monkeypatch.setattr("adam_ghost.run.feedback._REACH", 1e-6)
    nearer = Training(gpt(), adam(), data=texts).attach(feedback="differences").train(6)
    assert apart(nearer.scores(), want) <= 1e-6


@pytest.mark.parametrize("model, data", [(mlp, None), (gpt, texts)], ids=["mlp", "gpt"])
@pytest.mark.parametrize("parts", [(6,), (5, 2)], ids=["", "accumulated"])
def test_gauss_newton_on_all_rows(monkeypatch, model, data, parts):
    for module in ("rerun", "feedback"):
        monkeypatch.setattr(f"adam_ghost.run.{module}.EVERY", 1)
    monkeypatch.setattr("adam_ghost.run.feedback._REACH", 1e-6)  # the model's derivative is a difference
    training = Training(model(), adam(), parts=parts, **{"data": data} if data else {}).attach(feedback="gauss-newton").train(6)
    want = training.credit(1, 4, 6, "gauss-newton")
    assert apart(training.scores(), want) <= 1e-6
    assert apart(training.credit(1, 4, 6), want) > 1e-3


def test_gauss_newton_on_some_rows_is_in_proportion(monkeypatch):
    """Batches in which every sample is there four times: every fourth row stands for all."""

    def fourfold(seed, n=8):
        return tuple(x.repeat_interleave(4, 0) for x in points(seed, n // 4))

    monkeypatch.setattr("adam_ghost.run.feedback._REACH", 1e-6)
    training = Training(mlp(), adam(), fourfold, parts=(8, 12)).attach(feedback="gauss-newton").train(6)
    assert apart(training.scores(), training.credit(1, 4, 6, "gauss-newton")) <= 1e-6


def test_without_feedback():
    training = Training(mlp(), adam(), parts=(3, 4)).attach(feedback="none").train(6)
    assert apart(training.scores(), training.credit(1, 4, 6, "none")) <= EXACT


@pytest.mark.parametrize("feedback", ["double", "forward"])
@pytest.mark.parametrize("divided", ["train_loss", "loop"])
def test_accumulation_over_uneven_micro_batches(divided, feedback):
    training = Training(mlp(), adam(), parts=(6, 1, 4), divided=divided).attach(feedback=feedback).train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


@pytest.mark.parametrize("parts, divided", [((6,), "train_loss"), ((4, 3), "loop")], ids=["", "accumulated"])
@pytest.mark.parametrize("max_norm, clipped", [(0.1, 6), (1.2, None), (100.0, 0)], ids=["all", "some", "none"])
def test_clipping_by_norm(max_norm, clipped, parts, divided):
    training = Training(mlp(), adam(), parts=parts, divided=divided, max_norm=max_norm).attach().train(6)
    found = sum(t.clipped for t in training.taken)
    assert 0 < found < 6 if clipped is None else found == clipped
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


def test_clipping_in_a_window_with_one_clipped_step():
    norms = []
    training = Training(
        mlp(), adam(), max_norm=1e9, clip=lambda ps, _: norms.append(nn.utils.clip_grad_norm_(ps, 1e9)) or norms[-1]
    )
    training.train(6)
    second, first = sorted(norms)[-2:]
    training = Training(mlp(), adam(), max_norm=float(first + second) / 2).attach().train(6)
    assert sum(t.clipped for t in training.taken) == 1
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


def test_a_schedule_of_learning_rates():
    rates = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)  # noqa: E731
    training = Training(mlp(), adam(), schedule=rates).attach().train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


@pytest.mark.parametrize("feedback", ["double", "forward", "differences"])
def test_several_targets(feedback):
    training = Training(mlp(), adam(), targets=3).attach(feedback=feedback).train(6)
    want = training.credit(1, 4, 6)
    assert want.shape == (24, 3)
    assert apart(training.scores(), want) <= (1e-3 if feedback == "differences" else EXACT)


@pytest.mark.parametrize("feedback", ["double", "forward"])
def test_frozen_parameters(feedback):
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    training = Training(model, adam()).attach(feedback=feedback).train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("feedback", ["double", "forward", "differences"])
def test_a_parameter_without_gradient_in_some_steps(feedback, amsgrad):
    training = Training(Sometimes(), adam(amsgrad=amsgrad)).attach(feedback=feedback, window=5, ahead=3).train(8)
    moved = ["extra.weight" in t.hyper for t in training.taken]
    assert True in moved[:5] and False in moved[:5] and moved[0] != moved[1]
    assert apart(training.scores(), training.credit(1, 5, 8)) <= (1e-3 if feedback == "differences" else EXACT)


class Disturbed(nn.Module):
    """Dropout, a buffer that counts, a normalization in eval mode, numbers drawn from every stream."""

    def __init__(self):
        super().__init__()
        self.net = mlp(dropout=0.3)
        self.net[2].p = 0.3
        self.steady = nn.BatchNorm1d(5, dtype=torch.float64).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.net(self.steady(x)) + 0.1 * torch.rand(3, dtype=torch.float64) + 0.1 * random.random() + np.random.rand()


@pytest.mark.parametrize("feedback", ["double", "forward", "differences", "gauss-newton", "none"])
@pytest.mark.parametrize("memory", [None, "0B"])
def test_training_is_unchanged_to_the_bit(feedback, memory):
    def after(attached):
        random.seed(0), np.random.seed(0)
        training = Training(Disturbed(), adam(amsgrad=True), parts=(4, 3), max_norm=1.0)
        if attached:
            training.attach(feedback=feedback, memory=memory, window=3, ahead=2, audit_every=2, audit_samples=2, strict=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the audit, which such noise spoils
            training.train(9)
        for seed, x, y in training.batches(99):  # gradients of a step to come
            torch.manual_seed(seed)
            training.train_loss((x, y)).backward()
        return everything(training.model, training.optimizer) | {
            "python": torch.tensor(random.getstate()[1]),
            "numpy": torch.from_numpy(np.random.get_state()[1].astype("int64")),
        }, training

    plain, _ = after(False)
    found, training = after(True)
    assert sum(s.window is not None for s in training.run.steps) == 6
    same(found, plain)


def test_nothing_stays_behind():
    training = Training(gpt(), adam(), data=texts)
    before = residue(training.model)
    training.attach().train(9)
    with pytest.warns(UserWarning, match="the run ended"):
        training.run.close()
    assert residue(training.model) == before


@pytest.mark.parametrize("feedback", ["double", "forward"])
@pytest.mark.parametrize("model, data", [(mlp, points), (gpt, texts)], ids=["mlp", "gpt"])
def test_dropout(model, data, feedback):
    """Under the masks of the training, which the batches meet again."""
    training = Training(model(dropout=0.4), adam(), data, parts=(4, 3)).attach(feedback=feedback, strict=True).train(6)
    want = training.credit(1, 4, 6)
    assert apart(training.scores(), want) <= EXACT
    for module in training.model.modules():
        module.dropout = module.p = 0.0
    assert apart(training.credit(1, 4, 6), want) > 0.1


def steps_of(run):
    """``(step, window, horizon)`` of each record, in their order."""
    return [(s.step, s.window, s.horizon) for s in run.steps]


@pytest.mark.parametrize("window, ahead, every", [(3, 0, 1), (3, 2, 1), (2, 5, 1), (3, 1, 2), (2, 5, 2), (1, 0, 1), (1, 3, 3)])
def test_windows_follow_each_other(window, ahead, every):
    """Side by side, overlapping, with gaps; each score looks to its own window's end, and is booked in the order of steps."""
    training = Training(mlp(), adam(), parts=(3, 2)).attach(window=window, ahead=ahead, every=every).train(12)
    firsts = [f for f in range(1, 13, window * every) if f + window - 1 + ahead <= 12]
    want = [training.credit(f, f + window - 1, f + window - 1 + ahead) for f in firsts]
    assert apart(training.scores(), torch.cat(want)) <= EXACT
    assert steps_of(training.run) == [
        (step, f, f + window - 1 + ahead - step) for f in firsts for step in range(f, f + window)
    ]  # fmt: skip
    kept = [s.number for s in training.run._schedule._kept]
    assert kept == list(range(kept[0], 13)) if kept else True
    for s in training.run.steps:
        torch.testing.assert_close(s.score_sum, s.total, rtol=1e-9, atol=1e-12)


def test_closed_in_the_middle():
    training = Training(mlp(), adam()).attach(window=4, ahead=3).train(10)
    with pytest.warns(UserWarning) as told:
        training.run.close()
    assert [str(w.message) for w in told] == [
        f"adam_ghost: the run ended {missing} steps before the window from step {first} did: its scores look less far ahead"
        for missing, first in ((1, 5), (5, 9))
    ]
    want = [training.credit(1, 4, 7), training.credit(5, 8, 10), training.credit(9, 10, 10)]
    assert apart(training.scores(), torch.cat(want)) <= EXACT
    ends = {1: 7, 5: 10, 9: 10}
    firsts = [1] * 4 + [5] * 4 + [9] * 2
    assert steps_of(training.run) == [(s, f, ends[f] - s) for s, f in enumerate(firsts, 1)]


def test_a_ledger_holds_window_and_horizon(tmp_path):
    pytest.importorskip("duckdb")
    training = Training(mlp(), adam(), targets=2).attach(window=3, ahead=2, ledger=tmp_path / "run").train(8)
    training.run.flush()
    query = 'select step, "window", horizon from steps where target = 1'
    found = [tuple(row.values()) for row in ag.open_ledger(tmp_path / "run").sql(query).to_pylist()]
    assert found == steps_of(training.run) == [(1, 1, 4), (2, 1, 3), (3, 1, 2), (4, 4, 4), (5, 4, 3), (6, 4, 2)]
    training.run._schedule._plans.clear()
    training.run.close()


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("max_norm", [None, 1.2], ids=["", "clipped"])
@pytest.mark.parametrize("bad", [(), (1,), (3,), (4,), (0, 5)], ids=str)
def test_a_gradient_scaler_that_skips_steps(bad, max_norm, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    training = Training(mlp(), adam(fused=fused), parts=(4, 3), scaler=scaler, bad=bad, max_norm=max_norm)
    training.attach().train(6 + len(bad))
    assert len(training.taken) == 6
    run = training.run
    scored = [s for s in run.steps if not s.skipped]
    # a step that the optimizer itself skipped has a number, one that it was not called for has none
    called = fused
    end = 6 - sum(b < 6 for b in bad) * called
    last = 4 - sum(b < 4 for b in bad) * called
    assert len(scored) == last
    # clip_grad_norm_ adds 1e-6 to a norm that is known but for the scale's growth
    assert apart(training.scores(), training.credit(1, last, end)) <= (EXACT if max_norm is None else 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run ends in a window
        run.close()
    numbers = [s.step for s in run.steps]
    assert numbers == sorted(numbers)
    assert [s.step for s in run.steps if s.skipped] == [b + 1 if called else b - sum(c < b for c in bad) for b in bad]
