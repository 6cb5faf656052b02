"""Products by differences against double backward, whatever the weights' norm, the vector and the precision."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adam_ghost.capture.calls import rng_state
from adam_ghost.demo.model import GPT
from adam_ghost.processes.world import World
from adam_ghost.run.feedback import differences, double
from adam_ghost.run.rerun import Rerun
from adam_ghost.run.small_step import _PARTS, SmallSteps, norm

VOCABULARY, CONTEXT, N = 50, 16, 4


class Setting:
    """A model at some weights, with a kept batch, its gradient, and small steps; ``gradients``: how many were taken."""

    def __init__(self, model, loss, inputs, autocast=None):
        self.rerun = Rerun(model, dict(model.named_parameters()), loss, World())
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            self.batch = self.rerun.keep(range(N), inputs, None, rng_state(self.rerun.device))
        self.batch.scale = torch.tensor(1.0)
        self.grads = self.rerun.gradient([self.batch])
        self.steps = SmallSteps(self.rerun)
        self.gradients, take = 0, self.rerun.gradient

        def counted(batches):
            self.gradients += 1
            return take(batches)

        self.rerun.gradient = counted

    def product(self, vector):
        return differences(self.rerun, [self.batch], self.grads, vector, self.steps)

    def exact(self, vector):
        return double(self.rerun, [self.batch], self.grads, vector, self.steps)

    def error(self, vector):
        exact = self.exact(vector)
        return float(norm([x - y for x, y in zip(self.product(vector), exact, strict=True)]) / norm(exact))


def language_model(autocast=None, idle=0.0, layers=4, width=64):
    """``idle``: the norm of weights that do nothing."""
    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, layers, width, heads=4)
    if idle:
        model.idle = nn.Parameter(torch.full((100,), idle / 10))
    tokens = torch.randint(VOCABULARY, (2 * N, CONTEXT + 1))
    loss = lambda x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())  # noqa: E731
    return Setting(model, loss, tokens[:N], autocast), vectors(model, loss(tokens[N:]))


def vectors(model, val_loss):
    """The gradient of another loss, as SGD moves weights and as Adam's first step does."""
    grads = torch.autograd.grad(val_loss, list(model.parameters()), allow_unused=True)
    plain = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]
    return {"sgd": plain, "adam": [g / (g.abs() + 1e-6) for g in plain]}


@pytest.mark.parametrize("vector", ["sgd", "adam"])
@pytest.mark.parametrize("idle", [0.0, 1e6])
@pytest.mark.parametrize(
    "autocast, least", [(None, 5e-3), (torch.float16, 0.08), (torch.bfloat16, 0.3)], ids=["float32", "float16", "bfloat16"]
)
def test_differences_hold_in_a_model_that_bends_strongly(vector, idle, autocast, least):
    """At the weights of its initialization a language model's gradients turn round within a thousandth of the weights' norm."""
    setting, along = language_model(autocast, idle)
    assert setting.error(along[vector]) < least


def test_float64_may_come_as_near_as_it_likes(monkeypatch):
    monkeypatch.setitem(_PARTS, 23, 1e-7)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    setting = Setting(model, lambda x: model(x).square().mean(), torch.randn(N, 5, dtype=torch.float64))
    assert setting.error([torch.randn_like(p) for p in model.parameters()]) < 1e-6


def test_one_gradient_a_product_once_the_length_is_known():
    setting, along = language_model()
    setting.product(along["adam"])
    assert 1 < setting.gradients <= 8
    setting.gradients = 0
    assert setting.error([1e3 * x for x in along["adam"]]) < 5e-3  # whatever the vector's own length
    assert setting.gradients == 1
    setting.steps.begin()
    assert setting.error(along["adam"]) < 5e-3
    assert setting.gradients == 2


def test_a_vector_that_bends_unlike_the_last_is_followed_by_some_more():
    setting, along = language_model()
    setting.product([torch.randn_like(x) for x in along["sgd"]])
    errors = [setting.error(along["sgd"]) for _ in range(5)]
    assert errors[0] > 0.01 and errors[-1] < 5e-3


def test_one_vector_that_hardly_bends_does_not_lead_astray():
    setting, along = language_model()
    for _ in range(2):
        setting.product(along["sgd"])
    setting.product([torch.randn_like(x) for x in along["sgd"]])
    assert setting.error(along["sgd"]) < 0.012


def test_steps_to_either_side_cancel_what_they_leave_out(monkeypatch):
    monkeypatch.setitem(_PARTS, 23, 1e-2)
    setting, along = language_model()
    exact = setting.exact(along["adam"])
    setting.product(along["adam"])
    off = [[x - y for x, y in zip(setting.product(along["adam"]), exact, strict=True)] for _ in range(2)]
    one, both = norm(off[0]), norm([(x + y) / 2 for x, y in zip(*off, strict=True)])
    assert 2e-3 * norm(exact) < one and both < 0.1 * one


def quadratic(at):
    """``w`` from ``at`` times ones, under ``|w|^2 / 2``, whose second derivative is 1."""
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, at)
    return Setting(model, lambda x: model.weight.square().sum() / 2 + 0 * model(x).sum(), torch.zeros(N, 3))


@pytest.mark.parametrize("at", [0.0, 1e-20, 1.0])
def test_where_the_gradient_is_nothing_or_small(at):
    setting = quadratic(at)
    for _ in range(3):
        torch.testing.assert_close(setting.product([torch.full((1, 3), 2.0)])[0], torch.full((1, 3), 2.0), rtol=1e-3, atol=0)


def test_a_vector_of_zeros_and_one_after_it():
    setting = quadratic(1.0)
    for value in (0.0, 2.0, 0.0, 2.0):
        found = setting.product([torch.full((1, 3), value)])[0]
        torch.testing.assert_close(found, torch.full((1, 3), value), rtol=1e-3, atol=0)


def test_a_first_step_that_goes_where_the_loss_is_no_number():
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, 1e-5)
    setting = Setting(model, lambda x: -(1 - 1e9 * model.weight.square().sum()).sqrt() + 0 * model(x).sum(), torch.zeros(N, 3))
    assert setting.error([torch.ones(1, 3)]) < 5e-3 and setting.gradients > 1
    assert setting.error([torch.ones(1, 3)]) < 5e-3


def test_a_loss_that_bends_nowhere():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    setting = Setting(model, lambda x: model(x).mean(), torch.randn(N, 3))
    for _ in range(2):
        found = setting.product([torch.ones_like(p) for p in model.parameters()])
        assert norm(found) < 1e-4 * norm(setting.grads)


def test_weights_are_afterwards_where_they_were():
    setting, along = language_model()
    before = [p.detach().clone() for p in setting.rerun.params]
    setting.product(along["adam"])
    for x, p in zip(before, setting.rerun.params, strict=True):
        assert torch.equal(x, p)
