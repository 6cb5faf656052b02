"""The direction ``P``: what a unit of each parameter's gradient does to the validation loss, through Adam's step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from adam_ghost import ops
from adam_ghost.state import AdamState
from adam_ghost.step import Step
from adam_ghost.validation import Validation, kept

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
    total: Tensor  # [K]: < P , g > with the gradients that P was formed for

    def reach(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        """``< P , g >`` for other gradients, ``[K]``: what the scores of all samples add up to."""
        P = [self.P[id(p)].flatten(1) for p in params]
        return torch.stack([x @ g.flatten().to(x.dtype) for x, g in zip(P, grads, strict=True)]).sum(0)


def validation_gradient(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], validation: Validation, at: str
) -> ValidationGradient:
    """The validation gradient by ``params`` at the ``midpoint`` of the step with ``grads``, after history alone, or here."""
    with moved(state, params, grads, at):
        loss, val_grads = validation.gradient(params)
    return ValidationGradient(loss, {id(p): g if loss.ndim else g.unsqueeze(0) for p, g in zip(params, val_grads, strict=True)})


@contextmanager
def moved(state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], at: str) -> Iterator[None]:
    """Inside the block the weights are where ``at`` says; a parameter without a gradient does not move to a midpoint."""
    lists = state.lists(params)
    # through .data: the weights come back, so a graph that saved these parameters stays valid
    held = [p.data for p in params]
    with kept(params):
        if at == "midpoint":
            going = [i for i, g in enumerate(grads) if g is not None]
            some = [[x[i] for i in going] for x in (held, grads, *lists)]
            ops.weight_points(*some, mid=some[0])
        elif at == "lookahead":
            ops.weight_points(held, [None] * len(held), *lists, empty=held)
        yield


def form_direction(
    state: AdamState, params: Sequence[Tensor], grads: Sequence[Tensor | None], val: ValidationGradient, rule: str
) -> Direction:
    """``P`` by ``rule`` for a step whose gradient is, or is expected to be, ``grads``."""
    val_grads = [val.grads[id(p)] for p in params]
    out = [torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in val_grads]
    *moments, steps = state.lists(params)
    data = [p.data for p in params]
    P, sums = ops.variance_correction(data, list(grads), *moments, val_grads, steps, rule=rule, out=out)
    sums = sums.total()
    wide = out[0].dtype
    return Direction({id(p): x for p, x in zip(params, P, strict=True)}, val.loss, sums.history.to(wide), sums.reached.to(wide))


def find_direction(step: Step, validation: Validation, rule: str, at: str) -> Direction:
    """``P`` for the step, by ``rule``, with the validation gradient taken ``at`` the named weights."""
    val = validation_gradient(step.state, step.params, step.grads, validation, at)
    return form_direction(step.state, step.params, step.grads, val, rule)
