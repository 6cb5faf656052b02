"""What a run refuses to be built with, asked for and resumed from; each error names what was wrong."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.model import GPT


def gpt():
    return GPT(11, 6, layers=2, width=16, heads=2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda m: (m, [torch.optim.AdamW(m.parameters())] * 2, float), ValueError, "hold the same parameter"),
        (lambda m: (m, torch.optim.ASGD(m.parameters()), float), TypeError, "ASGD"),
        (lambda m: (m, torch.optim.AdamW(m.norm.parameters()), float), ValueError, "does not hold tokens.weight"),
        (lambda m: (m, torch.optim.AdamW(m.parameters()), 3), TypeError, "val_loss must be callable"),
        (lambda m: (m, torch.optim.AdamW(m.parameters()), lambda model: 0), TypeError, "val_loss is called without arguments"),
        (lambda m: (m, torch.optim.AdamW(m.parameters()), float, "soon"), ValueError, "schedule must be one of"),
        (lambda m: (id, torch.optim.AdamW(m.parameters()), float), TypeError, "model must be"),
        (lambda m: (m.requires_grad_(False), torch.optim.AdamW(m.parameters()), float), ValueError, "no trainable parameters"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ag.InRun(*arguments(gpt()))


def small(schedule="midpoint", **options):
    """A run, ready for ``one_step``."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters())
    return ag.InRun(model, optimizer, loss, schedule, **options), loss, optimizer


@pytest.fixture
def scored():
    run, loss, optimizer = small()
    with run:
        run.batch(range(6))
        loss().backward()
        optimizer.step()
    return run


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 8, "memory": "1GB"}, ValueError, "schedule='midpoint' scores single steps, and knows no window, memory"),
        ({"ledger": True}, TypeError, "ledger must be the folder to write to"),
    ],
)
def test_options_that_would_be_lost_or_are_none(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)


def test_a_decorator_may_give_val_loss_its_arguments():
    model = nn.Linear(3, 2)

    def loss(model):
        return model(torch.randn(2, 3)).sum()

    ag.InRun(model, torch.optim.AdamW(model.parameters()), functools.wraps(loss)(lambda: loss(model))).close()


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_no_number_of_samples(scored, k):
    with pytest.raises(ValueError, match="k must be a positive integer"):
        scored.top(k)


def test_another_models_state(scored):
    other = nn.Linear(3, 2)
    with ag.InRun(other, torch.optim.AdamW(other.parameters()), lambda: other(torch.randn(2, 3)).sum()) as run:
        with pytest.raises(ValueError, match="state is of a run over a model of 15 parameters in 2 tensors, and this model is"):
            run.load_state_dict(scored.state_dict())
        assert run.step == 0 and not run.scores().ids
