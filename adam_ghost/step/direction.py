"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through the optimizer's step."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adam_ghost.optim import OptState
from adam_ghost.optim.protocol import Foreseeing
from adam_ghost.step.step import Step
from adam_ghost.step.validation import Validation

PLACES = ("midpoint", "gauss", "lookahead", "current")
# the points of the two-point Gauss-Legendre rule, in halves of the way from w(empty) to the step's end
_GAUSS = (1 - 3**-0.5, 1 + 3**-0.5)

# by parameter name; None: no gradient, the parameter stays where it is
Gradients = Mapping[str, Tensor | None]


@dataclass
class ValidationGradient:
    """``loss`` is ``[]`` or ``[K]``; ``grads`` by parameter name, each ``[K, *shape]`` (``K = 1`` for a scalar loss)."""

    loss: Tensor
    grads: dict[str, Tensor]


@dataclass
class Direction:
    """``P`` by parameter name, each ``[K, *shape]`` in at least float32, and the validation loss where it was taken."""

    P: dict[str, Tensor]
    val_loss: Tensor  # [] or [K]
    history: Tensor  # [K]: what history alone took off the validation loss, to first order
    total: Tensor  # [K]: < P , g > with the gradients that P was formed for


def validation_gradient(
    opt_state: OptState, params: Mapping[str, Tensor], grads: Gradients | None, validation: Validation, at: str
) -> ValidationGradient:
    """The validation gradient by ``params`` at the ``midpoint`` of the step with ``grads``, after history alone, or here.

    ``gauss``: the mean of those at the two Gauss points of the step, of losses that draw the same random numbers.
    """
    held = list(params.values())
    with validation.weights_kept(held):
        if at == "gauss" and grads is not None:
            loss, val_grads = _gauss_gradient(opt_state, params, grads, validation)
        else:
            _move(opt_state, params, grads, at)
            loss, val_grads = validation.gradient(held)
    return ValidationGradient(loss, {k: g if loss.ndim else g.unsqueeze(0) for k, g in zip(params, val_grads, strict=True)})


def _moving(params: Mapping[str, Tensor], grads: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that a step with ``grads`` moves, and their gradients; the others stay where they are."""
    found = [(p, g) for p, g in ((p, grads[name]) for name, p in params.items()) if g is not None]
    return [p for p, _ in found], [g for _, g in found]


def _move(opt_state: OptState, params: Mapping[str, Tensor], grads: Gradients | None, at: str) -> None:
    """Puts the weights at the ``midpoint`` of the step, or after history alone (``lookahead``), in place."""
    # through .data: the weights come back, so a graph that saved these parameters stays valid
    if at == "lookahead":
        held = list(params.values())
        opt_state.weight_points(held, [None] * len(held), empty=[p.data for p in held])
    elif at == "midpoint" and grads is not None:
        moving, step = _moving(params, grads)
        opt_state.weight_points(moving, step, mid=[p.data for p in moving])


def _gauss_gradient(
    opt_state: OptState, params: Mapping[str, Tensor], grads: Gradients, validation: Validation
) -> tuple[Tensor, list[Tensor]]:
    moving, step = _moving(params, grads)
    data = [p.data for p in moving]
    empty, mid = ([torch.empty_like(x) for x in data] for _ in range(2))
    opt_state.weight_points(moving, step, empty=empty, mid=mid)
    found = []
    for t in _GAUSS:
        for x, e, m in zip(data, empty, mid, strict=True):
            torch.lerp(e, m, t, out=x)
        found.append(validation.gradient(list(params.values()), advance=t == _GAUSS[-1]))
    (loss, val_grads), (other_loss, others) = found
    return (loss + other_loss) / 2, list(torch._foreach_lerp(val_grads, others, 0.5))


def form_direction(
    opt_state: OptState,
    params: Mapping[str, Tensor],
    grads: Gradients | None,
    val: ValidationGradient,
    rule: str,
    keep: bool = False,
) -> Direction:
    """``P`` of ``params`` by ``rule`` for a step whose gradient is ``grads``, or what history lets expect where that is None.

    Takes the place of ``val``'s gradients, unless these are to ``keep``."""
    val_grads = [val.grads[name] for name in params]
    wide = [torch.promote_types(x.dtype, torch.float32) for x in val_grads]
    out = [torch.empty_like(x, dtype=t) if keep or t != x.dtype else x for x, t in zip(val_grads, wide, strict=True)]
    held = list(params.values())
    if grads is None and isinstance(opt_state, Foreseeing):
        found = opt_state.linearize_expected(held, val_grads, rule, out)
    else:
        at = [opt_state.expected_gradient(p) for p in held] if grads is None else [grads[name] for name in params]
        found = opt_state.linearize(held, at, val_grads, rule, out)
    return Direction(dict(zip(params, found.P, strict=True)), val.loss, found.history, found.total)


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    val = validation_gradient(step.opt_state, step.params, step.grads, validation, at)
    return form_direction(step.opt_state, step.params, step.grads, val, rule)
