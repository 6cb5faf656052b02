"""The elementwise optimizers in the compiled one-pass op, against their definitions in float64.

Tolerance: as in test_variance_correction: as good as the definition in float32, up to some roundings of what goes in, and of the
terms that the slope is a difference of.
"""

import copy

import pytest
import torch
from rounding import EPS, assert_as_good
from toys import elsewhere

from adam_ghost import extension
from adam_ghost.optim import one_pass, read_optimizer
from adam_ghost.optim.defined import Defined

pytestmark = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")

O = torch.optim
MAKES = {
    "SGD": lambda ps: O.SGD(ps, lr=0.1),
    "SGD-momentum": lambda ps: O.SGD(ps, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.2),
    "SGD-nesterov": lambda ps: O.SGD(ps, lr=0.1, momentum=0.8, nesterov=True, maximize=True, weight_decay=0.2),
    "RMSprop": lambda ps: O.RMSprop(ps, lr=0.1, alpha=0.8, momentum=0.7, weight_decay=0.2),
    "RMSprop-centered": lambda ps: O.RMSprop(ps, lr=0.1, alpha=0.8, centered=True, maximize=True, eps=1e-3),
    "Adagrad": lambda ps: O.Adagrad(ps, lr=0.1, lr_decay=0.3, weight_decay=0.2),
    "Adamax": lambda ps: O.Adamax(ps, lr=0.1, betas=(0.8, 0.7), weight_decay=0.2, maximize=True, eps=0.05),
    "NAdam": lambda ps: O.NAdam(ps, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, maximize=True),
    "NAdam-decoupled": lambda ps: O.NAdam(ps, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, decoupled_weight_decay=True),
    "RAdam": lambda ps: O.RAdam(ps, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2),
    "RAdam-decoupled": lambda ps: O.RAdam(ps, lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, decoupled_weight_decay=True),
    "Lion": lambda ps: elsewhere.Lion(ps, lr=0.1, weight_decay=0.2),
    "schedule-free": lambda ps: elsewhere.AdamWScheduleFree(ps, lr=0.1, weight_decay=0.2, betas=(0.9, 0.8)),
}
SHAPES = [(70, 15), (513,), (), (0,), (3, 5)]
RULES = ("secant", "tangent", "sgd")


def made(make, steps, dtype=torch.float32, unused=None):
    """Parameters and their optimizer about to take a step, after some; ``unused``: one that never had a gradient."""
    params = [torch.randn(s).to(dtype).requires_grad_() for s in SHAPES]
    opt = make(params)
    for step in range(steps + 1):
        for i, p in enumerate(params):
            p.grad = None if i == unused else (torch.randn(p.shape) * 2.0 ** -(step % 3)).to(dtype)
        if step < steps:
            opt.step()
    return params, opt


def wide(params, opt):
    """The same in float64."""
    params, opt = copy.deepcopy((params, opt))
    for p in params:
        state = {k: x.double() if isinstance(x, torch.Tensor) else x for k, x in opt.state[p].items()} if p in opt.state else {}
        g, p.data = p.grad, p.data.double()
        p.grad = None if g is None else g.double()
        if state:
            opt.state[p] = state
    return params, opt


def gradients(params, grads):
    return [None if g is None else g.to(p.dtype) for p, g in zip(params, grads, strict=True)]


def directions(cls, state, params, grads, val, rule):
    out = [torch.full_like(v, torch.nan) for v in val]
    return cls.linearize(state, params, gradients(params, grads), val, rule, out)


def roundings(f, tensors):
    """How far ``f()`` moves where each of the float64 ``tensors`` moves by some roundings."""
    at, moved = f(), 0.0
    for x in tensors:
        held = x.detach().clone()
        for h in (8 * EPS, -8 * EPS):
            x.data.mul_(1 + h)
            moved = moved + (f() - at).abs()
            x.data.copy_(held)
    return moved + 16 * EPS * at.abs() + torch.finfo(torch.float32).tiny


def first_term(state, p):
    """The slope of the step of ``p`` at its end, were its size a constant: the slope is this less another like it."""
    row = state._rows[p]
    c = state.coefficients(row.scalars)
    m, v, _ = (torch.zeros_like(p) if i is None or row.state[i] is None else row.state[i] for i in state.slots)
    x = c.l2 * p + (-p.grad if c.uphill else p.grad)
    square = c.square_v * v + c.square_x * x * x - (c.off_m * m + c.off_x * x) ** 2
    size = c.root * square.clamp(min=0).sqrt() + c.eps if c.size == 0 else torch.maximum(c.square_v * v, x.abs() + c.eps)
    return (c.lr * c.mean_x * (c.plain + c.adaptive / size)).detach().abs()


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_matches_float64(make, steps):
    params, opt = made(make, steps)
    grads, state = [p.grad for p in params], read_optimizer(opt)
    assert type(state)._compiled(state, params) is not None
    params64, opt64 = wide(params, opt)
    state64, val = read_optimizer(opt64), [torch.randn(2, *s) for s in SHAPES]
    val64 = [v.double() for v in val]
    for rule in RULES:
        got, low = (directions(cls, state, params, grads, val, rule) for cls in (type(state), Defined))
        exact = directions(Defined, state64, params64, grads, val64, rule)
        for i, p in enumerate(params64):
            if not p.numel():
                continue
            held = [x for x in opt64.state.get(p, {}).values() if isinstance(x, torch.Tensor) and x.shape == p.shape and x.ndim]
            own = lambda i=i, p=p, rule=rule: directions(Defined, state64, [p], [p.grad], [val64[i]], rule).P[0]  # noqa: E731
            bound = roundings(own, [p, p.grad, *held]) + 16 * EPS * val64[i].abs() * first_term(state64, p)
            assert_as_good(got.P[i], low.P[i], exact.P[i], bound)
        for name in ("history", "total"):
            size = sum((v * (g if name == "total" else torch.ones(()))).abs().sum() for v, g in zip(val, grads, strict=True))
            assert_as_good(getattr(got, name), getattr(low, name), getattr(exact, name), 64 * EPS * size)
    found, low, exact = ([[torch.full_like(p, torch.nan) for p in ps] for _ in range(2)] for ps in (params, params, params64))
    for cls, s, ps, points in (
        (type(state), state, params, found),
        (Defined, state, params, low),
        (Defined, state64, params64, exact),
    ):
        cls.weight_points(s, ps, gradients(ps, grads), empty=points[0], mid=points[1])
    for x, y, z in zip(*(points[0] + points[1] for points in (found, low, exact)), strict=True):
        assert_as_good(x, y, z, 8 * EPS * (z.abs() + 1))


@pytest.mark.parametrize("name", MAKES)
def test_bfloat16_and_parameters_without_gradients(name):
    params, opt = made(MAKES[name], 4, torch.bfloat16, unused=None if name in ("Lion", "schedule-free") else 4)
    grads, state = [p.grad for p in params], read_optimizer(opt)
    val = [torch.randn(3, *s).bfloat16() for s in SHAPES]
    got, want = (directions(cls, state, params, grads, val, "secant") for cls in (type(state), Defined))
    for x, y in zip(got.P, want.P, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-9)
    mid, expected = ([torch.empty_like(p) for p in params] for _ in range(2))
    state.weight_points(params, grads, mid=mid)
    Defined.weight_points(state, params, grads, mid=expected)
    for x, y in zip(mid, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_untouched_elements_are_finite(make):
    """Elements without history or gradient, and with the smallest of them."""
    params = [torch.ones(6, requires_grad=True)]
    opt = make(params)
    params[0].grad = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1.0])
    opt.step()
    params[0].grad = torch.tensor([0.0, 0.0, 1e-30, 1e-22, 1e-10, 1.0])
    for rule in RULES:
        found = directions(type(read_optimizer(opt)), read_optimizer(opt), params, [params[0].grad], [torch.ones(6)], rule)
        assert found.P[0].isfinite().all() and found.total.isfinite().all() and found.history.isfinite().all()


def test_scalars_in_tensors():
    params, opt = made(MAKES["RMSprop"], 3)
    val = [torch.randn(s) for s in SHAPES]
    grads, want = (
        [p.grad for p in params],
        directions(type(read_optimizer(opt)), read_optimizer(opt), params, [p.grad for p in params], val, "secant"),
    )
    opt.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
    got = directions(type(read_optimizer(opt)), read_optimizer(opt), params, grads, val, "secant")
    for x, y in zip(got.P, want.P, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


def test_mistakes_are_named():
    params, opt = made(MAKES["SGD"], 1)
    state, val = read_optimizer(opt), [torch.randn(s) for s in SHAPES]
    with pytest.raises(ValueError, match=r"val_grads\[1\]: expected shape \[513\], got \[512\]"):
        directions(type(state), state, params, [p.grad for p in params], [val[0], val[1][1:], *val[2:]], "secant")
    with pytest.raises(ValueError, match="rule must be one of secant, tangent, sgd, got 'frozen'"):
        directions(type(state), state, params, [p.grad for p in params], val, "frozen")


def test_who_watches_every_op_sees_pytorchs(monkeypatch):
    monkeypatch.setattr(one_pass, "is_in_torch_dispatch_mode", lambda: True)
    params, opt = made(MAKES["Adagrad"], 2)
    grads, state, val = [p.grad for p in params], read_optimizer(opt), [torch.randn(s) for s in SHAPES]
    got, want = (directions(cls, state, params, grads, val, "secant") for cls in (type(state), Defined))
    assert all(map(torch.equal, got.P, want.P))
