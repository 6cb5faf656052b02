"""What happened to the gradients between the backward pass and the optimizer's step, told without keeping a copy.

Clipping and unscaling multiply each gradient by one number, which is found from its norms and passed on to the scores.
Whatever else is done to them (noise, masks, clipping by value) changes the proportion of two different norms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor


@dataclass
class Fingerprint:
    """Norms of gradients at one moment."""

    tensors: list[Tensor]
    versions: list[int]
    l1: Tensor  # [number of gradients]
    l2: Tensor

    @classmethod
    def of(cls, grads: Sequence[Tensor]) -> "Fingerprint":
        dtype = reduce(torch.promote_types, {g.dtype for g in grads}, torch.float32)
        l1, l2 = (torch.stack(torch._foreach_norm(list(grads), p, dtype=dtype)) for p in (1, 2))
        return cls(list(grads), [g._version for g in grads], l1, l2)

    def untouched(self, grads: Sequence[Tensor]) -> bool:
        """Whether autograd knows of no change since, at no cost: a gradient scaler's unscaling, for one, escapes it."""
        return len(grads) == len(self.tensors) and all(
            g is h and g._version == v for g, h, v in zip(grads, self.tensors, self.versions, strict=True)
        )

    def scale_to(self, later: "Fingerprint") -> tuple[Tensor, Tensor]:
        """Per gradient the factor it was multiplied by, ``[number of gradients]``, and where it was not one factor (bool)."""
        scale = torch.where(self.l2 > 0, later.l2 / self.l2, 1.0)
        # half-precision gradients are rounded anew when scaled: independent errors, of which the norms see the mean
        resolution = torch.tensor([torch.finfo(g.dtype).eps for g in later.tensors], device=scale.device, dtype=scale.dtype)
        edited = (later.l1 - scale * self.l1).abs() > (1e-4 + resolution) * later.l1 + (self.l2 == 0) * later.l1
        return scale, edited
