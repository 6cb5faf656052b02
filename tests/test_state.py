"""AdamState against what optimizer.step() really does, and the scalings against naive formulas in float64."""

import itertools

import pytest
import torch

from adam_ghost import AdamState, reference

VARIANTS = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.3}),
    "adam-l2": (torch.optim.Adam, {"weight_decay": 0.3}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "amsgrad-l2": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "maximize": (torch.optim.Adam, {"maximize": True, "weight_decay": 0.2}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "tensor-lr": (torch.optim.AdamW, {"foreach": False, "lr": torch.tensor(0.01, dtype=torch.float64)}),
    "decoupled-flag": (torch.optim.Adam, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
}


def make(variant, steps):
    torch.manual_seed(0)
    kind, options = VARIANTS[variant]
    params = [torch.randn(4, 3, dtype=torch.float64).requires_grad_(), torch.randn(5, dtype=torch.float64).requires_grad_()]
    groups = [{"params": params[:1]}, {"params": params[1:], "betas": (0.8, 0.95), "eps": 1e-6}]
    optimizer = kind(groups, **{"lr": 0.01, **options})
    for step in range(steps):
        for p in params:
            p.grad = torch.randn_like(p) * 0.7**step
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(("variant", "steps"), itertools.product(VARIANTS, [0, 1, 2, 7]))
def test_weights_are_those_of_the_optimizers_step(variant, steps):
    params, optimizer = make(variant, steps)
    grads = [torch.randn_like(p) for p in params]
    state = AdamState.of(optimizer)
    after = [state.weights(p, g) for p, g in zip(params, grads, strict=True)]
    alone = [state.empty_weights(p) for p in params]
    middle = [state.mid_weights(p, g) for p, g in zip(params, grads, strict=True)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()
    for p, w, e, mid in zip(params, after, alone, middle, strict=True):
        torch.testing.assert_close(w, p.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mid, (e + w) / 2, rtol=1e-12, atol=1e-12)
    params, optimizer = make(variant, steps)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, e in zip(params, alone, strict=True):
        torch.testing.assert_close(e, p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("variant", "steps"), itertools.product(VARIANTS, [1, 2, 7]))
def test_scalings(variant, steps):
    params, optimizer = make(variant, steps)
    state = AdamState.of(optimizer)
    for p in params:
        g = torch.randn_like(p)
        sign = -1 if state[p].scalars.maximize else 1  # the scaling is by the gradient that Adam sees
        chord = (state.update(p, g) - state.update(p, None)) / g * sign
        torch.testing.assert_close(state.scaling(p, g, "secant"), chord, rtol=1e-8, atol=1e-10)
        h = 1e-6
        slope = (state.update(p, g + h) - state.update(p, g - h)) / (2 * h) * sign
        torch.testing.assert_close(state.scaling(p, g, "tangent"), slope, rtol=1e-6, atol=1e-8)
        assert torch.equal(state.scaling(p, g, "sgd"), torch.ones_like(p))
        s = state[p].scalars
        v = state[p].max_exp_avg_sq if s.amsgrad else state[p].exp_avg_sq
        frozen = (1 - s.beta1) / (1 - s.beta1**s.t) / ((v / (1 - s.beta2 ** (s.t - 1))).sqrt() + s.eps)
        torch.testing.assert_close(state.scaling(p, g, "frozen"), frozen)


@pytest.mark.parametrize("rule", reference.RULES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_first_steps_are_finite_in_float32(rule, steps):
    p = torch.randn(1000).requires_grad_()
    optimizer = torch.optim.AdamW([p])
    # zeros, denormals, and the range that float32's squares leave
    size = torch.logspace(-44, 18, 1000) * (torch.arange(1000) % 5 > 0)
    for _ in range(steps):
        p.grad = torch.randn(1000) * size.roll(100)
        optimizer.step()
    g = torch.randn(1000) * size
    state = AdamState.of(optimizer)
    assert state.scaling(p, g, rule).isfinite().all()
    assert state.scaling(p, torch.zeros(1000), rule).isfinite().all()
    if rule == "secant":
        exact = (state.update(p, g).double() - state.update(p, None).double()).abs()
        assert ((state.scaling(p, g, rule).double() * g).abs() <= exact * 1.01 + 1e-4).all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adamax])
def test_other_optimizers_are_refused(optimizer):
    with pytest.raises(TypeError, match=optimizer.__name__):
        AdamState.of(optimizer([torch.zeros(1, requires_grad=True)], lr=0.1))


def test_subclass_that_steps_differently_is_refused():
    class Other(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    class Same(torch.optim.AdamW):
        pass

    params = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(TypeError, match="Other"):
        AdamState.of(Other(params))
    assert params[0] in AdamState.of(Same(params))
