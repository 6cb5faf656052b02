"""Adam's step as functions of the gradient, and its linearizations: plain PyTorch, exact in float64, on any device.

Sources: arXiv 1412.6980, 1711.05101; the linearization ``frozen`` is arXiv 2602.00329's, the secant this project's
(docs/method.md, 2). ``m, v`` are Adam's moments before the step, ``g`` the gradient, ``w`` the weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.history import typical_gradient

RULES = ("secant", "tangent", "frozen", "sgd")

Scalar = float | Tensor
State = Tensor | None  # of one parameter; None: zeros
Tensors = Sequence[Tensor]
States = Sequence[State]


class StepScalars(NamedTuple):
    """Scalars of one parameter's step number ``t`` (1-based). Each number is a float or a 0-D tensor (no host sync)."""

    t: Scalar
    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    eps: float
    weight_decay: float = 0.0
    decoupled: bool = False  # AdamW's decay of the weights instead of Adam's L2 term in the gradient
    amsgrad: bool = False
    maximize: bool = False

    @property
    def bc1(self) -> Scalar:
        return 1 - self.beta1**self.t

    @property
    def bc2(self) -> Scalar:
        return 1 - self.beta2**self.t


Steps = Sequence[StepScalars]


def _sqrt(x: Scalar) -> Scalar:
    return x.sqrt() if isinstance(x, Tensor) else x**0.5


def _wide(x: Tensor | None, like: Tensor) -> Tensor:
    """``x`` in at least float32, zeros where the optimizer holds no such state yet."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros_like(like, dtype=dtype) if x is None else x.to(dtype)


def _sum_after(lead: int, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` summed over all but the first ``lead`` dimensions; there may be no others."""
    return x.unsqueeze(-1).flatten(lead).sum(-1, dtype=dtype)


class _Path(NamedTuple):
    """The straight path of the effective gradient, ``start -> end = start + g``, and the state that Adam meets it with."""

    start: Tensor  # L2 decay's share of the gradient, 0 without it
    g: Tensor  # the samples' share, negated under maximize
    m: Tensor
    v: Tensor
    v_max: Tensor | None
    s: StepScalars

    def second_moment(self, x: Tensor) -> Tensor:
        """Adam's second moment after a step with gradient ``x``, before bias correction."""
        v = self.s.beta2 * self.v + (1 - self.s.beta2) * x * x
        return v if self.v_max is None else torch.maximum(self.v_max, v)

    def root(self, x: Tensor) -> Tensor:
        return self.second_moment(x).sqrt() / _sqrt(self.s.bc2)

    def update(self, x: Tensor) -> Tensor:
        first = (self.s.beta1 * self.m + (1 - self.s.beta1) * x) / self.s.bc1
        return first / (self.root(x) + self.s.eps)


def _path(s: StepScalars, w: Tensor, g: Tensor | None, m: Tensor | None, v: Tensor | None, v_max: Tensor | None) -> _Path:
    start = _wide(w, w) * s.weight_decay if s.weight_decay and not s.decoupled else _wide(None, w)
    g = _wide(g, w)
    return _Path(start, -g if s.maximize else g, _wide(m, w), _wide(v, w), _wide(v_max, w) if s.amsgrad else None, s)


def adam_update(s: StepScalars, w: Tensor, g: State, m: State, v: State, v_max: State = None) -> Tensor:
    """``update(g)`` of one parameter: what the step subtracts, over lr, decoupled decay aside. ``g=None`` is ``update(0)``."""
    path = _path(s, w, g, m, v, v_max)
    return path.update(path.start + path.g)


def empty_weights(s: StepScalars, w: Tensor, m: State, v: State, v_max: State = None) -> Tensor:
    """``w(empty)``: the weights after the step that history (momentum and weight decay) would take alone."""
    kept = _wide(w, w) * (1 - s.lr * s.weight_decay) if s.decoupled else _wide(w, w)
    return kept - s.lr * adam_update(s, w, None, m, v, v_max)


def mid_weights(s: StepScalars, w: Tensor, g: State, m: State, v: State, v_max: State = None) -> Tensor:
    """``w_mid``: halfway from ``w(empty)`` to the weights after the whole batch's step."""
    half = (adam_update(s, w, g, m, v, v_max) - adam_update(s, w, None, m, v, v_max)) * 0.5
    return empty_weights(s, w, m, v, v_max) - s.lr * half


def scaling(rule: str, s: StepScalars, w: Tensor, g: State, m: State, v: State, v_max: State = None) -> Tensor:
    """``S``: the elementwise slope of Adam's update along the gradient, by ``rule``; at least float32.

    ``secant``: ``(update(g) - update(0)) / g``, without dividing by ``g``; ``tangent``: the derivative at ``g``;
    ``frozen``: arXiv 2602.00329, the state before the step; ``sgd``: 1. Small denominators are divided by one after
    another: in float32 their product underflows where ``v`` was never touched.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    path = _path(s, w, g, m, v, v_max)
    if rule == "sgd":
        return torch.ones_like(path.g)
    if rule == "frozen":
        before = 1 - s.beta2 ** (s.t - 1)
        # at t = 1 both v and its correction are zero: any correction but zero gives A = eps
        before = torch.where(before > 0, before, 1.0) if isinstance(before, Tensor) else before or 1.0
        root = (path.v if path.v_max is None else path.v_max).sqrt() / _sqrt(before)
        return (1 - s.beta1) / s.bc1 / (root + s.eps)
    a, g = path.start, path.g
    e = a + g
    root_e = path.root(e)
    c2 = (1 - s.beta2) / s.bc2
    if rule == "tangent":
        first, grown = (s.beta1 * path.m + (1 - s.beta1) * e) / s.bc1, 2 * root_e
        slope = 2 * c2 * e
        if path.v_max is not None:
            slope = torch.where(s.beta2 * path.v + (1 - s.beta2) * e * e >= path.v_max, slope, 0.0)
        near = root_e
    else:
        first = (s.beta1 * path.m + (1 - s.beta1) * a) / s.bc1
        near = path.root(a)
        grown = root_e + near
        slope = c2 * (2 * a + g)  # of the second moment between the path's ends, bias-corrected
        if path.v_max is not None:
            # the second moment stands still below v_max: only the part of the path above it counts
            low, high = (s.beta2 * path.v + (1 - s.beta2) * x * x for x in (a, e))
            part = (torch.maximum(high, path.v_max) - torch.maximum(low, path.v_max)) / s.bc2
            crosses = (low < path.v_max) != (high < path.v_max)
            slope = torch.where(crosses, part / torch.where(g == 0, 1.0, g), torch.where(low < path.v_max, 0.0, slope))
    bracket = torch.where(grown == 0, 0.0, slope / torch.where(grown == 0, 1.0, grown))  # of the root
    return ((1 - s.beta1) / s.bc1 - first / (near + s.eps) * bracket) / (root_e + s.eps)


def expected_gradient(s: StepScalars, w: Tensor, m: State, v: State) -> State:
    """The gradient that history lets expect, before the backward pass; None where there is no history."""
    if m is None or v is None:
        return None
    expected = typical_gradient(m, _wide(v, w) / (1 - s.beta2 ** (s.t - 1)))
    return -expected if s.maximize else expected


def direction(rule: str, s: StepScalars, val_grad: Tensor, w: Tensor, g: State, m: State, v: State, v_max: State = None) -> Tensor:
    """``P = lr * val_grad * S``, signed so that ``< P , g_i >`` is sample ``i``'s score (positive = it lowers the loss).

    ``val_grad`` is ``[*w.shape]``, or ``[K, *w.shape]`` for ``K`` targets, and so is the result.
    """
    S = scaling(rule, s, w, g, m, v, v_max)
    return val_grad.to(S.dtype) * (S * (-s.lr if s.maximize else s.lr))


def history(s: StepScalars, val_grad: Tensor, w: Tensor, m: State, v: State, v_max: State = None) -> Tensor:
    """``< val_grad , w - w(empty) >``, ``[]`` or ``[K]``: what momentum and decay alone take off the loss, to first order."""
    moved = s.lr * adam_update(s, w, None, m, v, v_max)  # not from w(empty): a small step would drown in w's rounding
    if s.decoupled:
        moved = moved + s.lr * s.weight_decay * _wide(w, w)
    return _sum_after(val_grad.ndim - w.ndim, val_grad.to(moved.dtype) * moved)


def variance_correction(
    rule: str,
    steps: Steps,
    params: Tensors,
    grads: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    max_exp_avg_sqs: States,
    val_grads: Tensors,
    out: Tensors,
    foreseen: bool = False,
) -> Tensor:
    """``direction`` of every parameter, written to ``out``, and a table of sums, float64 ``[parameters, 2 K]``.

    ``foreseen``: at the gradients that history lets expect, in place of ``grads``.

    A row holds ``< P , grad >`` of each target, then their ``history``. ``P`` counts as it was written. ``out`` may hold the
    very tensors of ``val_grads``.
    """
    rows = []
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, out)
    for s, w, g, m, v, v_max, val, P in zip(steps, *lists, strict=True):
        lead = val.ndim - w.ndim
        g = expected_gradient(s, w, m, v) if foreseen else g
        moved = history(s, val, w, m, v, v_max)  # [] or [K]
        P.copy_(direction(rule, s, val, w, g, m, v, v_max))
        reached = _sum_after(lead, _wide(P, P) * _wide(g, w), torch.float64)  # [] or [K]
        rows.append(torch.cat([reached.reshape(-1), moved.double().reshape(-1)]))
    return torch.stack(rows)


class Adjoint(NamedTuple):
    """Derivatives of a number ``L`` by a parameter's state and by its step's gradient: ``[*w.shape]`` or ``[K, *w.shape]``."""

    w: Tensor
    m: Tensor
    v: Tensor
    v_max: Tensor | None
    g: Tensor


def step_adjoint(
    s: StepScalars,
    w: Tensor,
    g: State,
    m: State,
    v: State,
    v_max: State,
    lambda_w: Tensor,
    lambda_m: Tensor,
    lambda_v: Tensor,
    lambda_v_max: State = None,
) -> Adjoint:
    """The vector-Jacobian product of one step: ``lambda_*``, derivatives of ``L`` by the state after it, taken to before it.

    Where the second moment is 0 its root has no derivative, and 0, that of the symmetric limit, is taken. Where ``v_max`` and the
    new second moment are equal, each gets half, as in the derivative of ``torch.maximum``. ``v_max`` is read under amsgrad alone.
    """
    path = _path(s, w, g, m, v, v_max)
    lambda_w, lambda_m, lambda_v = (x.to(path.g.dtype) for x in (lambda_w, lambda_m, lambda_v))  # [*w.shape] or [K, *w.shape]
    x = path.start + path.g  # what the moments take in
    root = path.root(x)
    per_m = s.lr / s.bc1 / (root + s.eps)  # the step is per_m * new_m
    new_m = s.beta1 * path.m + (1 - s.beta1) * x
    rooted = 2 * s.bc2 * torch.where(root == 0, 1.0, root)  # d second moment / d root
    by_u = torch.where(root == 0, 0.0, per_m * new_m / (root + s.eps) / rooted)
    to_m, to_u = lambda_m - lambda_w * per_m, lambda_w * by_u
    if path.v_max is not None:
        new_v, to_u = s.beta2 * path.v + (1 - s.beta2) * x * x, to_u + _wide(lambda_v_max, to_u)
        share = torch.where(new_v > path.v_max, 1.0, torch.where(new_v == path.v_max, 0.5, 0.0)).to(x.dtype)
        to_u, lambda_v_max = to_u * share, to_u * (1 - share)
    to_v = lambda_v + to_u
    to_x = (1 - s.beta1) * to_m + 2 * (1 - s.beta2) * x * to_v
    to_w = lambda_w * (1 - s.lr * s.weight_decay) if s.decoupled else lambda_w + s.weight_decay * to_x
    return Adjoint(to_w, s.beta1 * to_m, s.beta2 * to_v, lambda_v_max, -to_x if s.maximize else to_x)


def adjoint(
    steps: Steps,
    params: Tensors,
    grads: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    max_exp_avg_sqs: States,
    lambda_w: Tensors,
    lambda_m: Tensors,
    lambda_v: Tensors,
    lambda_v_max: Tensors,
    out: Tensors,
) -> None:
    """``step_adjoint`` of every parameter: the lambdas are replaced by those before the step, ``out`` gets the gradients'.

    ``lambda_v_max`` may be ``[]`` where no step is amsgrad's.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lambda_w, lambda_m, lambda_v)
    for i, (s, *tensors) in enumerate(zip(steps, *lists, strict=True)):
        held = [*tensors[5:], lambda_v_max[i] if lambda_v_max else None]
        found = step_adjoint(s, *tensors[:5], *held)
        for target, value in zip((*held, out[i]), found, strict=True):
            if target is not None and value is not None:
                target.copy_(value)


def weight_points(
    steps: Steps,
    params: Tensors,
    grads: States,
    exp_avgs: States,
    exp_avg_sqs: States,
    max_exp_avg_sqs: States,
    empty: Tensors,
    mid: Tensors,
) -> None:
    """``empty_weights`` and ``mid_weights`` of every parameter, written to ``empty`` and ``mid`` (``[]``: not written).

    Either may hold the very tensors of ``params``.
    """
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    for i, (s, w, g, m, v, v_max) in enumerate(zip(steps, *lists, strict=True)):
        at_empty, at_mid = empty_weights(s, w, m, v, v_max), mid_weights(s, w, g, m, v, v_max)
        for target, value in ((empty, at_empty), (mid, at_mid)):
            if target:
                target[i].copy_(value)
