"""How far weights are moved along a vector for a difference: until what is looked at has changed by a small part of its size.

A difference leaves out about that part of itself, and holds what rounding leaves, divided by that part. Neither depends on the
model's size, the norm of its weights or the vector, as it would for steps of a given length (docs/measured.md).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from adam_ghost.processes.world import World
from adam_ghost.run.rerun import KeptBatch, Rerun

# that part, by the bits that operands of products keep (float32, float16 or TF32, bfloat16): where both errors are small
_PARTS = {23: 1e-3, 10: 0.03, 7: 0.1}
# lengths, as parts of the weights' norm: where nothing is known yet, and at most
_START, _FURTHEST = 1e-3, 0.1
# what weights are at least taken to measure, each: a model that starts from zeros would take no step
_LEAST_WEIGHT = 0.01
# as factors, how near the part has to come, in how many tries; and how much more a step of the run may bend than the one after it
_NEAR, _TRIES, _STEADY = 2, 8, 4


def is_exact(rerun: Rerun, batches: Sequence[KeptBatch]) -> bool:
    """Whether gradients are of float32 throughout, or wider."""
    return _bits(rerun, batches) == max(_PARTS)


def is_half(rerun: Rerun) -> bool:
    """Whether there are weights of half precision."""
    return any(p.element_size() <= 2 for p in rerun.params)


def _bits(rerun: Rerun, batches: Sequence[KeptBatch]) -> int:
    """Of the significand, that the operands of the gradient's products keep at least."""
    dtypes = {*(batch.autocast for batch in batches), *(p.dtype for p in rerun.params)}
    rounded = _rounded_products(rerun)
    if torch.bfloat16 in dtypes or "bf16" in rounded or rerun.world.rounds:
        return 7
    return 10 if torch.float16 in dtypes or "tf32" in rounded else 23


def _rounded_products(rerun: Rerun) -> set[str]:
    """To what operands of float32 products are rounded: TF32 on a GPU, as PyTorch's convolutions do unless told otherwise."""
    if all(p.dtype == torch.float64 for p in rerun.params):
        return set()
    backends: Any = torch.backends
    on_gpu = rerun.device.type == "cuda"
    settings = {
        nn.Module: backends.cuda.matmul if on_gpu else backends.mkldnn.matmul,
        _ConvNd: backends.cudnn.conv if on_gpu else backends.mkldnn.conv,
        nn.RNNBase: backends.cudnn.rnn if on_gpu else backends.mkldnn.rnn,
    }
    modules = list(rerun.model.modules())
    return {setting.fp32_precision for kind, setting in settings.items() if any(isinstance(m, kind) for m in modules)}


class SmallSteps:
    """The small steps of a walk back through a run's steps, by vectors that change little from one to the next."""

    def __init__(self, rerun: Rerun):
        self.rerun = rerun
        # [], float64: the factor of the vector in the last difference, and the largest that it might have been
        self.last = self.most = torch.zeros(())
        self._rate: Tensor | None = None  # [], float64: change per length; None: not known
        self._first: Tensor | None = None  # that of a walk's first vector
        self._side = 1

    def begin(self) -> None:
        """Another walk begins, by a vector like the last walk's first."""
        self._rate, self._first = self._first, None

    def difference(
        self,
        batches: Sequence[KeptBatch],
        vector: list[Tensor],
        size: Tensor,
        look: Callable[[], list[Tensor]],
        rows: bool = False,
    ) -> list[Tensor]:
        """``look() / c`` with the weights moved by ``c vector``; ``look`` returns the changes of something of norm ``size``.

        ``rows``: whether that something is of this process's rows, and not as large as the parameters. Steps go to either side in
        turn: what differences leave out has the same sign as the step, and cancels from one to the next.
        """
        world = self.rerun.world
        data = world.parts(p.data for p in self.rerun.params)
        length, weights, size = whole_norms(torch.stack([norm(vector), norm(data), size]), world).unbind()
        weights = weights.clamp(min=_LEAST_WEIGHT * sum(p.numel() for p in self.rerun.params) ** 0.5)
        joint = rows and not world.sharded
        change = _PARTS[_bits(self.rerun, batches)] * (_joint(size, world) if joint else size)
        # weights of half precision would stay where they are; those of others that the vector hardly moves do not matter
        rounding = max(torch.finfo(x.dtype).eps for x in data) * (1 if is_half(self.rerun) else 1e-3)
        to = _Distances(torch.where(length > 0, change, 0.0), *(x * weights for x in (_START, rounding, _FURTHEST)))
        self.most = torch.where(length > 0, to.furthest / length, 0.0)

        def look_at(distance: Tensor) -> tuple[list[Tensor], Tensor]:
            self.last = torch.where(length > 0, self._side * distance / length, 0.0)
            with moved(self.rerun, vector, self.last):
                found = look()
            return found, _joint(norm(found), world) if joint else whole_norms(norm(found), world)

        found = self._search(to, look_at) if self._rate is None else self._follow(self._rate, to, look_at)
        self._first = self._rate if self._first is None else self._first
        self._side = -self._side
        per = torch.where(self.last != 0, 1 / self.last, 0.0)
        return [x.mul_(per.to(x.dtype)) for x in found]

    def _follow(self, rate: Tensor, to: "_Distances", look_at: "_Look") -> list[Tensor]:
        """The changes at the distance that the last vector's rate gives, without waiting for the device."""
        distance = to.reach(rate)
        found, changed = look_at(distance)
        new = torch.where((changed > 0) & changed.isfinite(), changed / distance, rate)
        self._rate = torch.minimum(torch.maximum(new, rate / _STEADY), rate * _STEADY)
        return found

    def _search(self, to: "_Distances", look_at: "_Look") -> list[Tensor]:
        """The changes at a distance found by a few looks, the next as far as the last one's rate gives."""
        distance = to.start.clamp(to.nearest, to.furthest)
        for _ in range(_TRIES):
            found, changed = look_at(distance)
            if not bool(to.change > 0):
                break
            self._rate = changed / distance if 0 < float(changed) < math.inf else None
            if self._rate is not None:
                closer = to.reach(self._rate)
            else:
                closer = to.furthest if float(changed) == 0 else (1e-3 * distance).clamp(min=to.nearest)
            if 1 / _NEAR <= float(closer / distance) <= _NEAR:
                break
            distance = closer
        return found


class _Distances(NamedTuple):
    """``[]`` each, float64: the change that is wanted, 0 where there can be none, and how far to go for it."""

    change: Tensor
    start: Tensor
    nearest: Tensor
    furthest: Tensor

    def reach(self, rate: Tensor) -> Tensor:
        """How far the change is, if things change at this ``rate``."""
        return torch.where((self.change > 0) & (rate > 0), self.change / rate, self.start).clamp(self.nearest, self.furthest)


_Look = Callable[[Tensor], tuple[list[Tensor], Tensor]]  # of a distance: the changes there, and their norm


@contextmanager
def moved(rerun: Rerun, vector: list[Tensor], c: Tensor) -> Iterator[None]:
    """The weights at ``c vector`` from where they are."""
    rerun.world.settle()
    data = list(rerun.world.parts(p.data for p in rerun.params))
    before = [x.clone() for x in data]
    torch._foreach_add_(data, [v * c.to(v.dtype) for v in vector])
    try:
        yield
    finally:
        torch._foreach_copy_(data, before)
        rerun.world.settle()


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """``[]``, float64: of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)))


def whole_norms(norms: Tensor, world: World) -> Tensor:
    """The norms of whole tensors, from those of this process's parts."""
    return world.sum_parts(norms.square()).sqrt() if world.sharded else norms


def _joint(x: Tensor, world: World) -> Tensor:
    """The norm over the rows of all processes, from that over this one's."""
    return world.sum(x.square()).sqrt()
