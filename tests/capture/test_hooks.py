"""Modules that hooks or the known kinds of layers do not fit: scored as what they compute, or named."""

import pytest
import torch
from oracles import Problem
from torch import nn

import adam_ghost as ag

N = 5


def test_a_layer_with_a_forward_of_its_own_is_another_layer():
    """Its scores are those of what it computes, not of what its class would."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    layer = model[0]
    layer.forward = lambda x: nn.Linear.forward(layer, x).square()
    x, optimizer = torch.randn(N, 3).double(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = lambda: model(x).square().sum(1)  # noqa: E731
    cache = ag.LayerCache(model, lambda: losses().sum(), strict=True)
    with cache:
        losses().sum().backward()
    P = {k: 1e-3 * p.grad for k, p in model.named_parameters()}  # rule sgd, at the current weights, on the training loss
    shares = [torch.autograd.grad(losses()[i], list(model.parameters())) for i in range(N)]
    want = torch.stack([sum((p * g).sum() for p, g in zip(P.values(), gs, strict=True)) for gs in shares])
    torch.testing.assert_close(ag.attribute(cache, optimizer, rule="sgd", at="current"), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 4).double())], ids=["scripted", "traced"]
)
@pytest.mark.parametrize("part", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())], ids=["layer", "block"])
def test_scripted_modules_are_named(part, make):
    """They take no hooks, and show no functions."""
    model = nn.Sequential(nn.Linear(3, 4), make(part.double()), nn.Linear(4, 2)).double()
    options = {"fallback": False}
    case = Problem(model, (torch.randn(N, 3).double(),), (torch.randn(2, 3).double(),), cache_options=options).warm().record()
    with pytest.raises(RuntimeError, match=r"not attributed: 1\.(0\.)?weight, 1\.(0\.)?bias, 2\.weight, 2\.bias; "):
        case.attribute()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_scripted_whole_is_refused():
    model = torch.jit.script(nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="model must be a module that hooks can be hung on, got RecursiveScriptModule"):
        ag.InRun(model, optimizer, lambda: model(torch.ones(1, 3)).sum())
    assert not optimizer._optimizer_step_pre_hooks
