"""The rule of tolerance of the elementwise ops, where float32's own reference is the yardstick."""

import torch

EPS, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


def spread(f, inputs, unit):
    """How far ``f`` moves when each float64 input moves by some roundings: what no arithmetic of that unit can resolve."""
    at, moved = f(*inputs), 0.0
    for i, x in enumerate(inputs):
        for h in (8 * EPS, -8 * EPS):
            moved = moved + (f(*inputs[:i], x * (1 + h), *inputs[i + 1 :]) - at).abs()
    return moved + (8 * EPS + unit) * at.abs() + TINY


def assert_as_good(got, low, exact, bound):
    """``got`` is no further from ``exact`` than float32's ``low`` is, up to ``bound``; where ``low`` overflows, it may too."""
    judged = low.isfinite() & exact.isfinite()
    worse = judged & ~((got.double() - exact).abs() <= (low.double() - exact).abs() + bound)
    assert not worse.any(), f"got {got[worse][:3]} for {exact[worse][:3]}, float32 reference {low[worse][:3]}"
