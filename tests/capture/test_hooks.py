"""Modules that hooks or the known kinds of layers do not fit: scored as what they compute, or named."""

import copy

import pytest
import torch
from oracles import Problem
from torch import nn

import adam_ghost as ag
from adam_ghost.capture.hooks import StandIn, Told, has_own_forward, hook_gradient

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


def test_a_layer_tells_and_has_its_own_forward_back():
    layer, told = nn.Linear(3, 4), []
    listener = Told(layer, lambda *seen: told.append(seen))
    x = torch.randn(2, 3)
    want = layer(x)
    listener.attach()
    assert torch.equal(layer(input=x), want) and not has_own_forward(layer)
    copied = copy.deepcopy(layer)
    listener.detach()
    assert "forward" not in vars(layer) and torch.equal(copied(x), want)
    [(by, args, kwargs, output)] = told  # the copy told nothing
    assert by is layer and args == () and kwargs["input"] is x and torch.equal(output, want)


def test_a_layer_has_another_stand_in_back():
    layer = nn.Linear(3, 4)
    inner, told = StandIn(layer, lambda x: x + 1), []
    inner.attach()
    listener = Told(layer, lambda *seen: told.append(seen))
    listener.attach()
    assert torch.equal(layer(torch.zeros(2)), torch.ones(2)) and len(told) == 1
    listener.detach()
    assert vars(layer)["forward"] is inner
    listener.attach()
    layer.forward = mine = lambda x: x  # whoever replaces it in between keeps his own
    listener.detach()
    assert vars(layer)["forward"] is mine


def test_no_layer_tells_after_a_forward_pass_that_raised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    cache, raising = ag.LayerCache(model), []

    def step():
        with cache:
            model(torch.randn(N, 3)).square().sum().backward()

    for _ in range(4):
        step()
    assert any(cache._recorder._routes.values())
    model[0][1].register_forward_hook(lambda *_: raising.pop()() if raising else None)
    raising.append(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step()
    assert not any("forward" in vars(layer) for layer in model.modules())
    step()
    assert len(cache.recorded.calls) == 2


@pytest.mark.parametrize("of", ["a leaf", "a result", "a result with hooks"])
def test_a_hook_without_a_handle_is_one_of_all(of):
    x, seen = torch.ones(3, requires_grad=True), []
    y = x if of == "a leaf" else x * 2
    if of == "a result with hooks":
        y.register_hook(lambda grad: seen.append("before"))
    hook_gradient(y, lambda grad: seen.append(grad.tolist()))
    handle = y.register_hook(lambda grad: seen.append("after"))
    y.sum().backward(retain_graph=True)
    assert seen == ["before"] * (of == "a result with hooks") + [[1.0] * 3, "after"]
    handle.remove()
    seen.clear()
    y.sum().backward()
    assert "after" not in seen and [1.0] * 3 in seen
