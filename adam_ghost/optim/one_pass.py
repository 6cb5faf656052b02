"""The steps of the elementwise optimizers beside Adam in the compiled one-pass kernels, csrc/fraction.h: one form for all.

Of an element with weight ``w``, state ``m``, ``v`` and ``z``, and ``x``, its gradient with L2 decay, downhill, a step takes off

    lr * (plain * mean + adaptive * mean / size) + third * (z - third_w * w) + decay * w      mean = mean_m * m + mean_x * x

    size = root * sqrt(square_v * v + square_x * x^2 - (off_m * m + off_x * x)^2) + eps       "root"
    size = max(square_v * v, |x| + eps)                                                       "largest"

or, of the kind "sign", ``lr * sign(mean)`` and the last two terms. ``defined.Elementwise`` is the meaning, and serves where
the extension does not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import RULES
from adam_ghost.optim.chord import Scalar

SIZES = ("root", "largest", "sign")
Slots = tuple[int | None, int | None, int | None]
States = tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]  # m, v and z of each parameter; None: zeros


class Coefficients(NamedTuple):
    """Of one parameter's step; each is a float, or a 0-D tensor that the host does not read. Order: csrc/fraction.h's."""

    size: float  # place in SIZES
    lr: Scalar
    uphill: bool  # maximize
    l2: Scalar = 0.0
    mean_m: Scalar = 0.0
    mean_x: Scalar = 1.0
    square_v: Scalar = 0.0
    square_x: Scalar = 0.0
    off_m: Scalar = 0.0
    off_x: Scalar = 0.0
    root: Scalar = 1.0
    eps: Scalar = 1.0
    plain: Scalar = 0.0
    adaptive: Scalar = 0.0
    third: Scalar = 0.0
    third_w: Scalar = 0.0
    decay: Scalar = 0.0


def variance_correction(
    params: list[Tensor],
    grads: list[Tensor | None],
    states: States,
    val_grads: list[Tensor],
    steps: Sequence[Coefficients],
    rule: str,
    out: list[Tensor],
) -> adam_op.Sums | None:
    """``adam_op.variance_correction`` by these steps: ``P`` goes to ``out``; None, and nothing written, where they cannot."""
    if not params or _watched():
        return None
    sums = adam_op.new_sums(params, val_grads)
    state = [params, grads, *states, val_grads]
    lists = {"grads": grads, "val_grads": val_grads, "out": out}
    done = _run("variance_correction", params, lists, state, [out], steps, RULES.index(rule), False, sums)
    return adam_op.Sums(sums) if done else None


def weight_points(
    params: list[Tensor],
    grads: list[Tensor | None],
    states: States,
    steps: Sequence[Coefficients],
    empty: list[Tensor] | None,
    mid: list[Tensor] | None,
) -> bool:
    """``adam_op.weight_points`` by these steps; False, and nothing written, where they cannot."""
    if not params or _watched():
        return False
    lists = {"grads": grads, "empty": empty or None, "mid": mid or None}
    return _run("weight_points", params, lists, [params, grads, *states], [empty or [], mid or []], steps)


def _watched() -> bool:
    """Whether someone looks at every op: he sees PyTorch's own."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def _run(name, params, lists, inputs, outputs, steps, *rest):
    def check() -> None:
        lead = adam_op.targets(params, "val_grads", lists["val_grads"]) if "val_grads" in lists else (0, 1)
        adam_op.check(params, grads=lists["grads"])
        adam_op.check(params, *lead, **{k: v for k, v in lists.items() if k != "grads"})

    table, rows = adam_op.step_table(params, list(steps))
    return adam_op.in_extension(name, None, check, inputs, outputs, table, rows, *rest)
