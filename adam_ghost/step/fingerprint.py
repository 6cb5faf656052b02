"""What happened to the gradients between the backward pass and the optimizer's step, told without keeping a copy.

Clipping and unscaling multiply each gradient by one number, which is found from its norms and passed on to the scores.
Whatever else is done to them (noise, masks, clipping by value) changes the proportion of two different norms.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

EDITED = (
    "gradients were edited element by element between the backward pass and the step (clipped by value, masked, noise added):"
    " no sample's share of that is defined; scaling and clip_grad_norm_ are fine"
)


class Changes(NamedTuple):
    """What was done to gradients since their fingerprint."""

    scale: dict[str, Tensor]  # per gradient the factor it was multiplied by
    edited: Tensor  # [number of gradients], bool: where it was not one factor
    void: Tensor  # [], bool: whether any gradient is not finite


@dataclass
class Fingerprint:
    """Norms of named gradients at one moment."""

    tensors: dict[str, Tensor]
    versions: list[int]
    l1: Tensor  # [number of gradients]
    l2: Tensor

    @classmethod
    def of(cls, grads: Mapping[str, Tensor]) -> "Fingerprint":
        tensors = list(grads.values())
        dtype = reduce(torch.promote_types, {g.dtype for g in tensors}, torch.float32)
        l1, l2 = (torch.stack(torch._foreach_norm(tensors, p, dtype=dtype)) for p in (1, 2))
        return cls(dict(grads), [g._version for g in tensors], l1, l2)

    def untouched(self, grads: Mapping[str, Tensor]) -> bool:
        """Whether autograd knows of no change since, at no cost: a gradient scaler's unscaling, for one, escapes it."""
        return grads.keys() == self.tensors.keys() and all(
            grads[name] is g and g._version == version
            for (name, g), version in zip(self.tensors.items(), self.versions, strict=True)
        )

    def changes(self, grads: Mapping[str, Tensor]) -> Changes:
        """What was done to the gradients since. Raises ValueError if some were added or removed."""
        if grads.keys() != self.tensors.keys():
            raise ValueError("gradients were added or removed between the backward pass and the step")
        now = Fingerprint.of({name: grads[name] for name in self.tensors})
        scale = torch.where(self.l2 > 0, now.l2 / self.l2, 1.0)
        # half-precision gradients are rounded anew when scaled: independent errors, of which the norms see the mean
        eps = [torch.finfo(g.dtype).eps for g in now.tensors.values()]
        resolution = torch.tensor(eps, dtype=scale.dtype).to(scale.device, non_blocking=True)
        edited = (now.l1 - scale * self.l1).abs() > (1e-4 + resolution) * now.l1 + (self.l2 == 0) * now.l1
        return Changes(dict(zip(self.tensors, scale.unbind(), strict=True)), edited, ~now.l1.isfinite().all())


class GradientWatch:
    """Takes the fingerprint of a model's gradients at the end of each backward pass in which a recorded gradient arrived."""

    def __init__(self, params: Mapping[str, Tensor]):
        self._params = params
        self._tasks: set[int] = set()  # backward passes whose end is awaited
        self.fingerprint: Fingerprint | None = None

    def grads(self) -> dict[str, Tensor]:
        """The gradients as they are now."""
        return {name: p.grad for name, p in self._params.items() if p.grad is not None}

    def forward_begins(self) -> None:
        self._tasks.clear()

    def arrived(self) -> None:
        """A recorded gradient has come, in the midst of a backward pass."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        grads = self.grads()
        if grads:
            self.fingerprint = Fingerprint.of(grads)
