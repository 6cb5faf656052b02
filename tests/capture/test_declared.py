"""Custom autograd functions: a false declaration is found out, and the undeclared hide the batch."""

import pytest
import torch
from torch import nn

import adam_ghost as ag


def function(forward, backward):
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    return Mine


def record(mine):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(mine.apply(self.a(x)))

    model = Model()
    cache = ag.LayerCache(model, lambda: model(torch.ones(2, 3)).sum(), strict=True)
    with cache:
        model(torch.randn(4, 3)).square().sum().backward()
    return ag.attribute(cache, torch.optim.Adam(model.parameters()))


def test_true_declaration():
    assert record(ag.keeps_samples_apart(function(lambda x: 2 * x, lambda g: 2 * g))).shape == (4,)


@pytest.mark.parametrize(
    "mine",
    [function(lambda x: x - x.mean(0), lambda g: g - g.mean(0)), function(lambda x: 2 * x, lambda g: g - g.mean(0))],
    ids=["forward", "backward"],
)
def test_false_declaration(mine):
    with pytest.raises(RuntimeError, match=r"not attributed: b\.weight"):
        record(mine)
    with pytest.raises(ValueError, match="was declared to keep samples apart"):
        record(ag.keeps_samples_apart(mine))


def test_only_functions():
    with pytest.raises(TypeError, match="subclass of torch"):
        ag.keeps_samples_apart(len)
