"""Sums over gradients, each read once: their norms, and their products with a direction."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim import adam_op

adam_op.lib.define("gradient_sums(Tensor[] grads, Tensor[] along, str? impl) -> Tensor")


class GradientSums(NamedTuple):
    """Per gradient ``n``, float64, on the gradients' device."""

    l1: Tensor  # [n]
    l2: Tensor  # [n]
    reached: Tensor  # [n, K]: < P , g >; K = 0 without directions
    dtype: torch.dtype  # the widest among the directions', at least float32

    def along(self) -> Tensor:
        """``< P , g >`` over all gradients, ``[K]``, in ``dtype``."""
        return self.reached.sum(0).to(self.dtype)


def gradient_sums(grads: list[Tensor], along: Sequence[Tensor] = (), impl: str | None = None) -> GradientSums:
    """The norms of ``grads``, and their products with ``along``, ``[K, *shape]`` each, if given.

    impl: ``cpp`` (float32 and bfloat16) or ``reference``; chosen by device and dtype by default. The extension sums in float64,
    the reference in the widest dtype among the gradients', at least float32. Raises ValueError where a shape does not fit.
    """
    table = adam_op.run("gradient_sums", grads, list(along), impl)
    return GradientSums(table[:, 0], table[:, 1].sqrt(), table[:, 2:], _widest(along))


def _gradient_sums(grads, along, impl):
    sums = _fake(grads, along, impl)
    if adam_op.in_extension("gradient_sums", impl, lambda: _check(grads, along), [grads, along], [], sums):
        return sums
    dtype = _widest(grads)
    norms = [torch.stack(torch._foreach_norm(grads, p, dtype=dtype)).double() for p in (1, 2)]
    columns = [norms[0], norms[1].square()]
    if along:
        dtype = _widest(along)
        pairs = [(P.reshape(len(P), g.numel()).to(dtype), g.flatten().to(dtype)) for P, g in zip(along, grads, strict=True)]
        reached = torch.stack([P @ g for P, g in pairs])
        columns += reached.double().unbind(1)
    return torch.stack(columns, 1)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, {x.dtype for x in tensors}, torch.float32)


def _fake(grads, along, impl):
    K = along[0].shape[0] if along else 0
    return torch.empty(len(grads), 2 + K, dtype=torch.float64, device=grads[0].device)


def _check(grads, along):
    adam_op.check(grads, grads=grads)
    if along:
        adam_op.check(grads, 1, along[0].shape[0], along=along)


adam_op.define("gradient_sums", _gradient_sums, _fake)
