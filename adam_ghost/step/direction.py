"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through the optimizer's step."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim import OptState
from adam_ghost.optim.protocol import Foreseeing
from adam_ghost.processes.world import World
from adam_ghost.step.step import Step
from adam_ghost.step.validation import Validation

_ONE_TARGET = methodcaller("unsqueeze", 0)
PLACES = ("midpoint", "gauss", "lookahead", "current")
# the points of the two-point Gauss-Legendre rule, in halves of the way from w(empty) to the step's end
_GAUSS = (1 - 3**-0.5, 1 + 3**-0.5)

_WIDE = (torch.float32, torch.float64)  # ``P`` is at least the first, where nothing reads it in less

# by parameter name; None: no gradient, the parameter stays where it is
Gradients = Mapping[str, Tensor | None]


@dataclass
class ValidationGradient:
    """``loss`` is ``[]`` or ``[K]``; ``grads`` by parameter name, each ``[K, *shape]`` (``K = 1`` for a scalar loss)."""

    loss: Tensor
    grads: dict[str, Tensor]


@dataclass
class Direction:
    """``P`` by parameter name, each ``[K, *shape]`` in at least float32, or ``rounded``; and the validation loss at its weights."""

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
    write = None
    if at == "lookahead":
        write = partial(_to_empty, opt_state, held)
    elif at == "midpoint" and grads is not None:
        write = partial(_to_middle, opt_state, params, grads)
    with validation.weights_kept(held, write) as (weights, _):
        if at == "gauss" and grads is not None:
            loss, val_grads = _gauss_gradient(opt_state, params, grads, weights, validation)
        else:
            loss, val_grads = validation.gradient(held)
    return ValidationGradient(loss, dict(zip(params, val_grads if loss.ndim else map(_ONE_TARGET, val_grads), strict=True)))


class _Moving(NamedTuple):
    """The parameters that a step moves; the others stay where they are."""

    params: list[Tensor]
    grads: list[Tensor]
    places: list[Tensor]  # for their weights

    @classmethod
    def of(cls, params: Mapping[str, Tensor], grads: Gradients, places: Sequence[Tensor]) -> "_Moving":
        found = [(p, g, x) for (name, p), x in zip(params.items(), places, strict=True) if (g := grads[name]) is not None]
        return cls([p for p, _, _ in found], [g for _, g, _ in found], [x for _, _, x in found])


def _to_empty(opt_state: OptState, params: list[Tensor], places: list[Tensor]) -> None:
    """Writes where history alone takes the weights."""
    opt_state.weight_points(params, [None] * len(params), empty=places)


def _to_middle(opt_state: OptState, params: Mapping[str, Tensor], grads: Gradients, places: list[Tensor]) -> None:
    """Writes the weights at the midpoint of the step, or as they are."""
    moving = _Moving.of(params, grads, places)
    if len(moving.params) < len(params):
        for (name, p), x in zip(params.items(), places, strict=True):
            if grads[name] is None:
                x.copy_(p.detach())
    opt_state.weight_points(moving.params, moving.grads, mid=moving.places)


def _gauss_gradient(
    opt_state: OptState, params: Mapping[str, Tensor], grads: Gradients, weights: Sequence[Tensor], validation: Validation
) -> tuple[Tensor, list[Tensor]]:
    moving, step, data = _Moving.of(params, grads, weights)
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
    world: World | None = None,
    keep: bool = False,
    rounded: Collection[str] = (),
) -> Direction:
    """``P`` of ``params`` by ``rule`` for a step whose gradient is ``grads``, or what history lets expect where that is None.

    Takes the place of ``val``'s gradients, unless these are to ``keep``. Those that nothing reads in more than bfloat16, the
    ``rounded`` ones, are written in it, by optimizers that read and write memory once.
    """
    val_grads = [val.grads[name] for name in params]
    narrow = {*rounded} if isinstance(opt_state, Foreseeing) else set()
    out = [
        torch.empty_like(x, dtype=torch.bfloat16)
        if name in narrow
        else x
        if x.dtype in _WIDE and not keep
        else torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        for name, x in zip(params, val_grads, strict=True)
    ]
    held = list(params.values())
    if grads is None and isinstance(opt_state, Foreseeing):
        found = opt_state.linearize_expected(held, val_grads, rule, out)
    else:
        at = [opt_state.expected_gradient(p) for p in held] if grads is None else [grads[name] for name in params]
        found = opt_state.linearize(held, at, val_grads, rule, out)
    history, total = (world or World()).sum_parts(torch.stack([found.history, found.total]))
    return Direction(dict(zip(params, found.P, strict=True)), val.loss, history, total)


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    val = validation_gradient(step.opt_state, step.params, step.grads, validation, at)
    return form_direction(step.opt_state, step.params, step.grads, val, rule, step.world)
