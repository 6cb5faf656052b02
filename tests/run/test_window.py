"""``schedule="window"``: scores are the derivative through the whole window, and training stays what it was."""

import copy
import gc
import os
import random
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from snapshots import everything, residue, same
from torch import nn
from trainings import Sometimes, Training, apart, conv, gpt, mlp, pictures, points, sample_losses, texts

import adam_ghost as ag
from adam_ghost.run.small_step import _PARTS
from adam_ghost.run.store import parse_bytes

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


@pytest.mark.parametrize("option", ["Adam", "AdamW-decay", "betas", "groups"])
def test_bounded_derivative(option):
    training = Training(mlp(), OPTIONS[option]).attach(bounded=True).train(6)
    want = training.credit(1, 4, 6, bounded=True)
    assert apart(training.scores(), want) <= EXACT
    assert apart(training.credit(1, 4, 6), want) > 1e-3


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
    monkeypatch.setitem(_PARTS, 23, 1e-6)
    nearer = Training(gpt(), adam(), data=texts).attach(feedback="differences").train(6)
    assert apart(nearer.scores(), want) <= 1e-6


@pytest.mark.parametrize("model, data", [(mlp, None), (gpt, texts)], ids=["mlp", "gpt"])
@pytest.mark.parametrize("parts", [(6,), (5, 2)], ids=["", "accumulated"])
def test_gauss_newton_on_all_rows(monkeypatch, model, data, parts):
    for module in ("rerun", "feedback"):
        monkeypatch.setattr(f"adam_ghost.run.{module}.EVERY", 1)
    monkeypatch.setitem(_PARTS, 23, 1e-6)  # the model's derivative is a difference
    training = Training(model(), adam(), parts=parts, **{"data": data} if data else {}).attach(feedback="gauss-newton").train(6)
    want = training.credit(1, 4, 6, "gauss-newton")
    assert apart(training.scores(), want) <= 1e-6
    assert apart(training.credit(1, 4, 6), want) > 1e-3


def test_gauss_newton_on_some_rows_is_in_proportion(monkeypatch):
    """Batches in which every sample is there four times: every fourth row stands for all."""

    def fourfold(seed, n=8):
        return tuple(x.repeat_interleave(4, 0) for x in points(seed, n // 4))

    monkeypatch.setitem(_PARTS, 23, 1e-6)
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


def test_resumed_in_the_middle_of_a_window():
    """What was scored stays, what was kept is left out, and the next window begins where the run goes on."""
    training = Training(mlp(), adam()).attach(window=3, ahead=1).train(5)
    state = training.run.state_dict()
    with pytest.warns(UserWarning, match="the run ended"):
        training.run.close()
    training.attach(window=3, ahead=1)
    with pytest.warns(UserWarning, match="in the middle of a window: steps 4 to 5"):
        training.run.load_state_dict(state)
    training.train(5)
    want = [training.credit(1, 3, 4), training.credit(6, 8, 9)]
    assert apart(training.scores(), torch.cat(want)) <= EXACT
    assert steps_of(training.run) == [(1, 1, 3), (2, 1, 2), (3, 1, 1), (6, 6, 3), (7, 6, 2), (8, 6, 1)]
    assert training.run.scores().ids[18] == "5.0.0"


def test_a_state_loaded_over_a_window_in_the_making():
    training = Training(mlp(), adam()).attach(window=2, ahead=0, memory="0B").train(2)
    state = training.run.state_dict()
    before = training.scores()
    training.train(1)
    kept = training.run._schedule._kept[0]
    training.run.load_state_dict(state)
    assert not kept.grads._path.exists() and not training.run._schedule._kept
    assert torch.equal(training.scores(), before)


@pytest.mark.parametrize("memory", ["0B", "2KB", "0.000006 GB", 10**9])
@pytest.mark.parametrize("feedback", ["double", "differences"])
def test_a_budget_of_memory(memory, feedback, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = dict(feedback=feedback, window=5, ahead=4)
    plain = Training(mlp(), adam(amsgrad=True), parts=(3, 3)).attach(**options).train(11)
    folders = lambda: list(tmp_path.glob("adam_ghost-*"))  # noqa: E731
    assert not folders()
    training = Training(mlp(), adam(amsgrad=True), parts=(3, 3)).attach(memory=memory, **options).train(11)
    store = training.run._schedule.store
    assert torch.equal(training.scores(), plain.scores())
    files = list(tmp_path.glob("adam_ghost-*/*"))
    assert bool(files) == (memory != 10**9)
    assert store.used <= store.limit
    if memory == "0B":
        assert store.used == 0
        # the gradients of steps 6 to 11; states at every third step of the windows from 1, 6 and 11 on
        assert len(files) == 6 + len({6, 7, 9, 11})
    for run in (plain.run, training.run):
        with pytest.warns(UserWarning, match="the run ended"):
            run.close()
    assert torch.equal(training.scores(), plain.scores())
    assert store.used == 0 and not folders()


def test_files_are_gone_with_a_run_that_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    training = Training(mlp(), adam()).attach(memory=0).train(2)
    assert list(tmp_path.glob("adam_ghost-*"))
    training.run = None
    gc.collect()
    assert not list(tmp_path.glob("adam_ghost-*"))


@pytest.mark.parametrize("amount, bytes", [("0B", 0), ("8GB", 8 * 10**9), (" 1.5 kib ", 1536), ("7", 7), (7, 7), (None, None)])
def test_amounts_of_memory(amount, bytes):
    assert parse_bytes(amount) == bytes


@pytest.mark.parametrize("amount", ["", "much", "-1GB", "8 apples", "1e9", -1, True, 1.5])
def test_what_is_no_amount_of_memory(amount):
    with pytest.raises(ValueError, match="memory must be an amount such as '8GB', or None, got"):
        Training(mlp(), adam()).attach(memory=amount)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++").split()[0]), reason="torch.compile found no C++ compiler")
def test_compiled_model():
    def scores(compiled):
        torch._dynamo.reset()
        training = Training(mlp(), adam(), max_norm=1.2)
        if compiled:
            training.trained = torch.compile(training.model)
        training.attach(feedback="differences").train(6)
        return training.scores()

    assert apart(scores(True), scores(False)) <= 1e-6


def test_a_model_compiled_in_place_is_refused():
    training = Training(mlp(), adam())
    training.model.compile()
    with pytest.raises(ValueError, match=r"model.compile\(\) hides the model's calls .*: use model = torch.compile\(model\)"):
        training.attach()


def left_out(steps, number, place, **options):
    """The validation loss after ``steps``, the sample at ``place`` of batch ``number`` left out."""
    parts = options["parts"]
    micro = sum(place >= sum(parts[: m + 1]) for m in range(len(parts)))
    training = Training(without=(number, micro, place - sum(parts[:micro])), **options).train(steps)
    return training.validation().detach()


AUDITED = {
    "": {},
    "clipped": {"max_norm": 0.1},
    "partly-clipped": {"max_norm": 1.2, "divided": "loop"},
    "targets": {"targets": 2},
    "schedule": {"schedule": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)},
}


@pytest.mark.parametrize("options", AUDITED.values(), ids=AUDITED)
@pytest.mark.parametrize("memory", [None, "0B"], ids=["", "files"])
def test_the_audit_is_leaving_out_and_training_on(options, memory):
    """Of the first step of each window; the loop is trained again in earnest, from the start, without the sample."""
    options = {"make": adam(torch.optim.Adam, weight_decay=0.1), "parts": (4, 3)} | options
    training = Training(mlp(), **options).attach(window=3, ahead=2, audit_every=1, audit_samples=3, memory=memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a low R, if it is
        training.train(8)
    audits = {s.step: s.audit for s in training.run.steps if s.audit is not None}
    assert list(audits) == [1, 4]
    scores = training.scores().view(6, 7, -1)
    for first, audit in audits.items():
        whole = Training(mlp(), **options).train(first + 4).validation().detach()
        truth = torch.stack([left_out(first + 4, first - 1, place, model=mlp(), **options) - whole for place in (0, 3, 6)])
        got, want = scores[first - 1, [0, 3, 6]].flatten(), truth.flatten()
        # a limit of the norm is known but for clip_grad_norm_'s 1e-6
        tolerance = 1e-5 if training.max_norm else 1e-8
        assert audit.r == pytest.approx(np.corrcoef(got, want)[0, 1], abs=tolerance)
        assert audit.relative_l2 == pytest.approx(float((got - want).norm() / want.norm()), abs=tolerance)
        assert audit.relative_l2 > 1e-4  # it is not the derivative


def test_audits_of_some_windows():
    training = Training(mlp(), adam(lr=1e-4)).attach(window=2, ahead=1, audit_every=3, audit_samples=4).train(15)
    audits = {s.step: s.audit for s in training.run.steps if s.audit is not None}
    assert list(audits) == [5, 11]
    # what samples do is proportional to their weight where steps are small
    assert all(a.r > 0.99 for a in audits.values())


def test_a_window_that_is_too_long_is_told(monkeypatch):
    monkeypatch.setattr("adam_ghost.run.window.TOO_LONG", 2.0)
    training = Training(mlp(), adam()).attach(window=2, ahead=1, audit_every=1).train(2)
    with pytest.warns(
        UserWarning, match="adam_ghost: windows of 2 steps and 1 ahead are too long here: at step 1 the credit has R ="
    ):
        training.train(1)


def test_a_batch_of_one_sample_has_no_correlation():
    training = Training(mlp(), adam(), parts=(1,)).attach(window=2, ahead=1, audit_every=1).train(3)
    assert np.isnan(training.run.steps[0].audit.r)


@pytest.mark.parametrize("too_long, room, lengths", [(2.0, 3.0, (4, 1)), (-2.0, -2.0, (16, 4)), (-2.0, 3.0, (8, 2))])
def test_windows_that_choose_their_length(monkeypatch, too_long, room, lengths):
    monkeypatch.setattr("adam_ghost.run.window.TOO_LONG", too_long)
    monkeypatch.setattr("adam_ghost.run.window.ROOM", room)
    training = Training(mlp(), adam()).attach(window="auto", ahead=2, audit_every=1)
    schedule = training.run._schedule
    assert schedule.options.window == 32
    schedule.options = replace(schedule.options, window=8)
    training.train(10)
    assert (schedule.options.window, schedule.options.ahead) == lengths
    # the next window had begun; the one after it is of the new length
    training.train(16 + sum(lengths) - 10)
    assert [s.window for s in training.run.steps] == [1] * 8 + [9] * 8 + [17] * lengths[0]


@pytest.mark.parametrize("length, too_long, room", [(4, 2.0, 3.0), (64, -2.0, -2.0)])
def test_windows_of_the_shortest_and_the_longest_length_stay(monkeypatch, length, too_long, room):
    monkeypatch.setattr("adam_ghost.run.window.TOO_LONG", too_long)
    monkeypatch.setattr("adam_ghost.run.window.ROOM", room)
    training = Training(mlp(), adam()).attach(window="auto", ahead=0, audit_every=1, feedback="none")
    schedule = training.run._schedule
    schedule.options = replace(schedule.options, window=length)
    training.train(length)
    assert training.run.steps[0].audit is not None and schedule.options.window == length


WRONG = {
    "train_loss": (None, TypeError, "train_loss must be a callable of what run.batch.* got NoneType"),
    "feedback": ("hessian", ValueError, "feedback must be one of auto, differences, double, .* got 'hessian'"),
    "window": (0, ValueError, "window must be an integer of at least 1, got 0"),
    "ahead": (-1, ValueError, "ahead must be an integer of at least 0, got -1"),
    "memory": ("lots", ValueError, "memory must be an amount such as '8GB', or None, got 'lots'"),
    "refresh": (2, ValueError, "refresh is of schedules that score single steps; .* must be 1, got 2"),
    "audit_samples": (1, ValueError, "audit_samples must be an integer of at least 2, got 1"),
    "audit_every": (0, ValueError, "audit_every must be a positive integer, got 0"),
    "every": (0, ValueError, "every must be a positive integer, got 0"),
}
WRONG_TYPES = {"window": (True, 4.0, "long"), "ahead": (False, None, 1.0)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    value, error, message = WRONG[name]
    training = Training(mlp(), adam())
    before = residue(training.model)
    with pytest.raises(error, match=message):
        training.attach(**{name: value})
    for other in WRONG_TYPES.get(name, ()):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
            training.attach(**{name: other})
    assert residue(training.model) == before


def test_windows_of_any_length_need_audits():
    with pytest.raises(ValueError, match="window='auto' goes by audits: give audit_every"):
        Training(mlp(), adam()).attach(window="auto")


def test_batches_without_inputs():
    training = Training(mlp(), adam()).attach()
    with pytest.raises(ValueError, match=r"call run.batch\(ids, inputs=...\) with what train_loss takes"):
        training.run.batch(range(6))


def squared(model):
    return lambda inputs: sample_losses(model(inputs[0]), inputs[1]).square().mean()


def of_the_first_half(model):
    return lambda inputs: sample_losses(model(inputs[0]), inputs[1])[:3].mean()


def penalized(model):
    return lambda inputs: (
        sample_losses(model(inputs[0]), inputs[1]).mean() + 0.1 * sum(p.square().sum() for p in model.parameters())
    )


@pytest.mark.parametrize("other", [squared, of_the_first_half, penalized])
def test_another_loss_than_the_loops(other):
    training = Training(mlp(), adam())
    training.attach(window=2, ahead=1, train_loss=other(training.model)).train(2)
    plain = Training(mlp(), adam()).train(3)
    message = r"adam_ghost: steps 1 to 2 have no scores: step 2: train_loss\(inputs\), run again .* gives another gradient.* step 3"
    with pytest.raises(ValueError, match=message):
        training.step()
    same(
        {k: x for k, x in everything(training.model, training.optimizer).items() if not k.startswith(("grad.", "random"))},
        {k: x for k, x in everything(plain.model, plain.optimizer).items() if not k.startswith(("grad.", "random"))},
    )


@pytest.mark.parametrize("feedback", ["double", "forward", "differences", "gauss-newton", "none"])
def test_a_loss_per_sample(feedback):
    training = Training(mlp(), adam())
    losses = lambda inputs: sample_losses(training.model(inputs[0]), inputs[1])  # noqa: E731
    training.attach(window=2, ahead=0, feedback=feedback, train_loss=losses).train(1)
    with pytest.raises(ValueError, match=r"train_loss must return the scalar that the loop calls backward\(\) on, got shape \[6\]"):
        training.step()


def test_gradients_that_are_changed_after_the_run_has_seen_them():
    """The step is not scored, nor is a window carried through it; the next window begins after it."""
    training = Training(mlp(), adam()).attach(window=3, ahead=1, memory="0B").train(1)
    folder = training.run._schedule.store._folder

    def clip(*_):
        nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)

    hook = training.optimizer.register_step_pre_hook(clip)
    with pytest.raises(RuntimeError, match=r"changed after the run had scored them, by another hook of the optimizer"):
        training.step()
    hook.remove()
    training.optimizer.zero_grad()
    assert not training.run._schedule._kept and not list(folder.iterdir())
    later = Training(training.model, lambda model: training.optimizer)
    later.run, later.number = training.run, 2
    state = {name: training.optimizer.state[p] for name, p in training.model.named_parameters()}
    begun = {k: (s["exp_avg"].clone(), s["exp_avg_sq"].clone(), s["exp_avg_sq"].clone(), int(s["step"])) for k, s in state.items()}
    later.train(4)
    assert apart(later.scores(), later.credit(1, 3, 4, state=begun)) <= EXACT
    assert steps_of(training.run) == [(3, 3, 3), (4, 3, 2), (5, 3, 1)]


def test_gradients_that_are_clipped_by_value():
    training = Training(mlp(), adam(), max_norm=0.01, clip=nn.utils.clip_grad_value_).attach()
    with pytest.raises(ValueError, match="gradients were edited element by element"):
        clip = training.clip
        training.clip = lambda params, limit: clip(params, limit) or torch.zeros(())
        training.step()


def test_parameters_that_are_frozen_in_mid_run():
    training = Training(mlp(), adam()).attach().train(1)
    training.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen or unfrozen in mid-run: 0.weight; schedule='window' needs a new run"):
        training.step()


class Several(nn.Module):
    """The first output need not be the loss's."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return {"squares": x * self.net[0].weight.square().sum(), "logits": self.net(x), "loss": None}


def train_several(loss, model=None, **options):
    model = model or Several()
    training = Training(model, adam())
    val_loss = lambda: loss(model(points(900, 9)[0]), points(900, 9)[1])  # noqa: E731
    train_loss = lambda inputs: loss(model(inputs[0]), inputs[1])  # noqa: E731
    with ag.InRun(model, training.optimizer, val_loss, "window", window=2, ahead=1, train_loss=train_loss, **options) as run:
        for seed in range(6):
            run.batch([f"{seed}-{i}" for i in range(6)], inputs=points(seed))
            train_loss(points(seed)).backward()
            training.optimizer.step()
            training.optimizer.zero_grad()
    return run


@pytest.mark.filterwarnings("ignore:adam_ghost. (windows of 2|the run ended)")
@pytest.mark.parametrize("feedback", ["differences", "gauss-newton"])
def test_models_of_several_outputs(feedback):
    """The one that the loss uses is looked at, the first or not."""
    options = {"feedback": feedback, "audit_every": 2}
    found = train_several(lambda out, y: sample_losses(out["logits"], y).mean(), **options)
    alone = train_several(lambda out, y: sample_losses(out, y).mean(), mlp(), **options)
    np.testing.assert_allclose(found.scores().total, alone.scores().total, rtol=1e-6)
    (r,), (want,) = ([s.audit.r for s in run.steps if s.audit] for run in (found, alone))
    assert r == pytest.approx(want)


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize(
    "option, message",
    [({"feedback": "gauss-newton"}, "feedback='gauss-newton' needs"), ({"audit_every": 1}, "audit_every needs")],
)
def test_losses_of_several_outputs(option, message):
    loss = lambda out, y: sample_losses(out["logits"], y).mean() + out["squares"].square().mean()  # noqa: E731
    run = train_several(loss)
    np.testing.assert_allclose(*zip(*((s.score_sum[0], s.total[0]) for s in run.steps), strict=True), rtol=1e-6)
    with pytest.raises(ValueError, match=f"{message} a model of whose outputs the loss uses one, got 2"):
        train_several(loss, **option)


@pytest.mark.parametrize(
    "option, message", [({"feedback": "gauss-newton"}, "feedback='gauss-newton' needs"), ({"audit_every": 1}, "audit_every needs")]
)
def test_models_whose_output_has_no_batch(option, message):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x).T  # [classes, n]

    training = Training(Transposed(), adam())
    loss = training.train_loss
    training.trained = lambda x: training.model(x).T
    training.run = ag.InRun(
        training.model,
        training.optimizer,
        training.validation,
        "window",
        window=2,
        ahead=0,
        train_loss=loss,
        **{"feedback": "double"} | option,
    )
    training.train(1)
    with pytest.raises(ValueError, match=message):
        training.step()


@pytest.mark.parametrize("which", [0, 1, 2, 4])
@pytest.mark.parametrize("memory", [None, "0B"], ids=["", "files"])
def test_a_step_that_turns_out_to_have_been_skipped(which, memory):
    """As on a GPU, where the host does not ask whether the optimizer stepped: its gradients were not finite."""
    training = Training(mlp(), adam()).attach(window=4, ahead=2, memory=memory).train(which)
    model, optimizer = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    training.train(1)
    training.model.load_state_dict(model)
    training.optimizer.load_state_dict(optimizer)
    training.taken.pop()
    kept = training.run._schedule._kept[-1]
    grads = [torch.full_like(g, float("inf")) for g in kept.grads.get()]
    kept.grads.drop()
    kept.grads, kept.void = training.run._schedule.store.put(grads), torch.tensor(True)
    training.train(5 - which)
    assert apart(training.scores(), training.credit(1, 3 if which < 4 else 4, 5)) <= EXACT
    assert [s.step for s in training.run.steps] == [1, 2, 3, 4]
    assert [s.step for s in training.run.steps if s.skipped] == [which + 1] * (which < 4)
