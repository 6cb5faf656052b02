"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through Adam's step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adam_ghost import ops
from adam_ghost.state import AdamState
from adam_ghost.step import Step
from adam_ghost.validation import Validation

PLACES = ("midpoint", "gauss", "lookahead", "current")
# the points of the two-point Gauss-Legendre rule, in halves of the way from w(empty) to the step's end
_GAUSS = (1 - 3**-0.5, 1 + 3**-0.5)


@dataclass
class ValidationGradient:
    """``loss`` is ``[]`` or ``[K]``; ``grads`` by parameter id, each ``[K, *shape]`` (``K = 1`` for a scalar loss)."""

    loss: Tensor
    grads: dict[int, Tensor]


@dataclass
class Direction:
    """``P`` by parameter id, each ``[K, *shape]`` in at least float32, and the validation loss where it was taken."""

    P: dict[int, Tensor]
    val_loss: Tensor  # [] or [K]
    history: Tensor  # [K]: what momentum and weight decay alone took off the validation loss, to first order
    total: Tensor  # [K]: < P , g > with the gradients that P was formed for

    def reach(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """``< P , g >`` for other gradients, ``[K]``: what the scores of all samples add up to."""
        P = [self.P[id(p)].flatten(1) for p in params]
        return torch.stack([x @ g.flatten().to(x.dtype) for x, g in zip(P, grads, strict=True)]).sum(0)


def validation_gradient(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], validation: Validation, at: str
) -> ValidationGradient:
    """The validation gradient by ``params`` at the ``midpoint`` of the step with ``grads``, after history alone, or here.

    ``gauss``: the mean of those at the two Gauss points of the step, of losses that draw the same random numbers.
    """
    with validation.weights_kept(params):
        if at == "gauss":
            loss, val_grads = _gauss_gradient(state, params, grads, validation)
        else:
            _move(state, params, grads, at)
            loss, val_grads = validation.gradient(params)
    return ValidationGradient(loss, {id(p): g if loss.ndim else g.unsqueeze(0) for p, g in zip(params, val_grads, strict=True)})


def _going(state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> tuple[list[Tensor], tuple]:
    """The weights that a step with ``grads`` moves, and what ``ops.weight_points`` takes of it; the others stay where they are."""
    going = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    # through .data: the weights come back, so a graph that saved these parameters stays valid
    data = [p.data for p, _ in going]
    return data, (data, [g for _, g in going], *state.lists([p for p, _ in going]))


def _move(state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], at: str) -> None:
    """Puts the weights at the ``midpoint`` of the step, or after history alone (``lookahead``), in place."""
    if at == "lookahead":
        data = [p.data for p in params]
        ops.weight_points(data, [None] * len(data), *state.lists(params), empty=data)
    elif at == "midpoint":
        data, step = _going(state, params, grads)
        ops.weight_points(*step, mid=data)


def _gauss_gradient(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], validation: Validation
) -> tuple[Tensor, list[Tensor]]:
    data, step = _going(state, params, grads)
    empty, mid = ([torch.empty_like(x) for x in data] for _ in range(2))
    ops.weight_points(*step, empty=empty, mid=mid)
    found = []
    for t in _GAUSS:
        for x, e, m in zip(data, empty, mid, strict=True):
            torch.lerp(e, m, t, out=x)
        found.append(validation.gradient(params, advance=t == _GAUSS[-1]))
    (loss, val_grads), (other_loss, others) = found
    return (loss + other_loss) / 2, torch._foreach_lerp(val_grads, others, 0.5)


def form_direction(
    state: AdamState,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    val: ValidationGradient,
    rule: str,
    keep: bool = False,
) -> Direction:
    """``P`` by ``rule`` for a step whose gradient is, or is expected to be, ``grads``; takes the place of ``val``'s gradients,
    unless these are to ``keep``."""
    val_grads = [val.grads[id(p)] for p in params]
    wide = [torch.promote_types(x.dtype, torch.float32) for x in val_grads]
    out = [torch.empty_like(x, dtype=t) if keep or t != x.dtype else x for x, t in zip(val_grads, wide, strict=True)]
    *moments, steps = state.lists(params)
    data = [p.data for p in params]
    P, sums = ops.variance_correction(data, list(grads), *moments, val_grads, steps, rule=rule, out=out)
    sums = sums.total()
    history, total = sums.history.to(out[0].dtype), sums.reached.to(out[0].dtype)
    return Direction({id(p): x for p, x in zip(params, P, strict=True)}, val.loss, history, total)


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    val = validation_gradient(step.state, step.params, step.grads, validation, at)
    return form_direction(step.state, step.params, step.grads, val, rule)
