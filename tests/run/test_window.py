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
    training = Training(mlp(), adam(), max_norm=1e9, clip=lambda ps, _: norms.append(nn.utils.clip_grad_norm_(ps, 1e9)) or norms[-1])
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
