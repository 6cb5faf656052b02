"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through Adam's step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adam_ghost import reference
from adam_ghost.state import AdamState
from adam_ghost.step import Step
from adam_ghost.validation import Validation, weights_at

PLACES = ("midpoint", "lookahead", "current")


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

    def total(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """``< P , g >`` for the given gradients, ``[K]``: what the scores of all samples add up to."""
        P = [self.P[id(p)].flatten(1) for p in params]
        return torch.stack([x @ g.flatten().to(x.dtype) for x, g in zip(P, grads, strict=True)]).sum(0)


def validation_gradient(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], validation: Validation, at: str
) -> ValidationGradient:
    """The validation gradient by ``params`` at the ``midpoint`` of the step with ``grads``, after history alone, or here."""
    points = None
    if at == "midpoint":
        # a parameter without a gradient does not move
        points = [p.detach() if g is None else state.mid_weights(p, g) for p, g in zip(params, grads, strict=True)]
    elif at == "lookahead":
        points = [state.empty_weights(p) for p in params]
    with weights_at(params, points):
        loss, val_grads = validation.gradient(params)
    return ValidationGradient(loss, {id(p): g if loss.ndim else g.unsqueeze(0) for p, g in zip(params, val_grads, strict=True)})


def form_direction(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], val: ValidationGradient, rule: str
) -> Direction:
    """``P`` by ``rule`` for a step whose gradient is, or is expected to be, ``grads``."""
    directions, history = {}, 0
    for p, g in zip(params, grads, strict=True):
        s, vg = state[p], val.grads[id(p)]
        directions[id(p)] = reference.direction(rule, s.scalars, vg, p.detach(), g, *s.moments)
        history = history + reference.history(s.scalars, vg, p.detach(), *s.moments)
    return Direction(directions, val.loss, history)


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    val = validation_gradient(step.state, step.params, step.grads, validation, at)
    return form_direction(step.state, step.params, step.grads, val, rule)
