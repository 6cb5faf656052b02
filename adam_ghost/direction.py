"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through Adam's step."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adam_ghost import reference
from adam_ghost.state import AdamState
from adam_ghost.step import Step
from adam_ghost.validation import Validation, weights_at

PLACES = ("midpoint", "lookahead", "current")


@dataclass
class Direction:
    """``P`` by parameter id, each ``[K, *shape]`` in at least float32, and what the step's books need."""

    P: dict[int, Tensor]
    val_loss: Tensor  # [] or [K], where the gradient was taken
    total: Tensor  # [K]: < P , g(B) >, what the scores add up to
    history: Tensor  # [K]: what momentum and weight decay alone took off the validation loss, to first order


def points(state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor], at: str) -> list[Tensor] | None:
    """The weights where the validation gradient is taken: ``w_mid``, ``w(empty)``, or None for where they are."""
    if at == "midpoint":
        return [state.mid_weights(p, g) for p, g in zip(params, grads, strict=True)]
    if at == "lookahead":
        return [state.empty_weights(p) for p in params]
    return None


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    state = step.state
    with weights_at(step.params, points(state, step.params, step.grads, at)):
        loss, val_grads = validation.gradient(step.params)
    directions, total, history = {}, 0, 0
    for p, g, vg in zip(step.params, step.grads, val_grads, strict=True):
        s = state[p]
        vg = vg if loss.ndim else vg.unsqueeze(0)
        P = reference.direction(rule, s.scalars, vg, p.detach(), g, *s.moments)
        directions[id(p)] = P
        total = total + (P * g.to(P.dtype)).flatten(1).sum(1)
        history = history + reference.history(s.scalars, vg, p.detach(), *s.moments)
    return Direction(directions, loss, total, history)
