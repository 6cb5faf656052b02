"""What happened to the gradients between the backward pass and the optimizer's step, told without keeping a copy.

Clipping and unscaling multiply each gradient by one number, which is found from its norms and passed on to the scores.
Whatever else is done to them (noise, masks, clipping by value) changes the proportion of two different norms.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.gradient_sums import gradient_sums
from adam_ghost.processes.world import World
from adam_ghost.same import same

EDITED = (
    "gradients were edited element by element between the backward pass and the step (clipped by value, masked, noise added, or a"
    " micro-batch's without run.batch added to them): no sample's share of that is defined; scaling and clip_grad_norm_ are fine"
)


@functools.cache
def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def gradients(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``.grad`` of those parameters that have one, by name."""
    return {name: g for name, g in zip(params, map(attrgetter("grad"), params.values()), strict=True) if g is not None}


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written to, as autograd counts."""
    return [*map(attrgetter("_version"), tensors)]


class Changes(NamedTuple):
    """What was done to gradients since their fingerprint."""

    names: list[str]  # of the gradients
    scale: Tensor  # [number of gradients]: the factor that each was multiplied by
    edited: Tensor  # [number of gradients], bool: where it was not one factor
    void: Tensor  # [number of gradients], bool: where it is not finite
    reached: Tensor | None  # [K]: < P , g >, if asked for

    def factors(self) -> dict[str, Tensor]:
        """``scale`` by name; empty where looking costs no synchronisation and shows that nothing was multiplied."""
        if self.scale.device.type == "cpu" and bool((self.scale == 1).all()):
            return {}
        return dict(zip(self.names, self.scale.unbind(), strict=True))


@dataclass
class Seen:
    """Named gradients as autograd knows them at one moment."""

    tensors: dict[str, Tensor]
    versions: list[int]

    @classmethod
    def now(cls, grads: Mapping[str, Tensor]) -> "Seen":
        return cls(dict(grads), versions(grads.values()))

    def untouched(self, grads: Mapping[str, Tensor]) -> bool:
        """Whether autograd knows of no change since, at no cost: a gradient scaler's unscaling, for one, escapes it."""
        held = list(grads.values())
        return list(grads) == list(self.tensors) and same(held, list(self.tensors.values())) and versions(held) == self.versions


class FinalGradients:
    """The gradients of some parameters, which an optimizer is about to step by, when they were scored."""

    def __init__(self, params: Mapping[str, Tensor]):
        self._params = params
        grads = self._now()
        self._seen = Seen.now(grads)
        # what escapes autograd multiplies all of them: a few small ones tell
        small = sorted(grads.values(), key=Tensor.numel)[:3]
        self._small = [(g, g.detach().clone()) for g in small]

    def _now(self) -> dict[str, Tensor]:
        return gradients(self._params)

    def untouched(self) -> bool:
        """Whether autograd knows of no change since."""
        return self._seen.untouched(self._now())

    def changed(self) -> Tensor:
        """``[]`` bool, on their device: whether their values changed."""
        if not self.untouched():
            return torch.ones((), dtype=torch.bool)
        return torch.stack([(g - before).nan_to_num().any() for g, before in self._small]).any()


@dataclass
class Fingerprint(Seen):
    """Norms of named gradients at one moment."""

    l1: Tensor  # [number of gradients]
    l2: Tensor

    @classmethod
    def of(cls, grads: Mapping[str, Tensor]) -> "Fingerprint":
        tensors = list(grads.values())
        sums = gradient_sums(tensors)
        return cls(dict(grads), versions(tensors), sums.l1, sums.l2)

    def only(self, names: Collection[str]) -> "Fingerprint":
        """Of those of the gradients that are named."""
        if len(names) == len(self.tensors):
            return self
        kept = [i for i, name in enumerate(self.tensors) if name in names]
        tensors = {name: g for name, g in self.tensors.items() if name in names}
        places = torch.tensor(kept).to(self.l1.device, non_blocking=True)
        return Fingerprint(tensors, [self.versions[i] for i in kept], self.l1[places], self.l2[places])

    def cleared(self, grads: Mapping[str, Tensor]) -> bool:
        """Whether the gradients are gone since, or zero."""
        # a change by way of .data escapes autograd: looking at values costs a synchronisation on a GPU, and little on a CPU
        hidden = bool(grads) and next(iter(grads.values())).device.type == "cpu" and bool(self.l1.any())
        if self.untouched(grads) and not hidden:
            return False
        return not any(bool(g.any()) for g in sorted(grads.values(), key=Tensor.numel))

    def changes(self, grads: Mapping[str, Tensor], world: World | None = None, P: Mapping[str, Tensor] | None = None) -> Changes:
        """What was done to the gradients since. Raises ValueError if some were added or removed."""
        if grads.keys() != self.tensors.keys():
            raise ValueError("gradients were added or removed between the backward pass and the step")
        held = [grads[name] for name in self.tensors]
        now = gradient_sums(held, [] if P is None else [P[name] for name in self.tensors])
        reached = None if P is None else now.along()
        l1, l2, l1_now, l2_now = self.l1, self.l2, now.l1, now.l2
        if world is not None and world.sharded:  # of whole gradients
            l1, l2, l1_now, l2_now = world.sum(torch.stack([l1, l2.square(), l1_now, l2_now.square()]))
            l2, l2_now = l2.sqrt(), l2_now.sqrt()
        seen = l2 > 0
        scale = torch.where(seen, l2_now / l2, 0.0)
        # a gradient of zeros does not tell: it was scaled as the others were
        scale = torch.where(seen, scale, torch.where(seen.any(), scale.sum() / seen.sum(), 1.0))
        # half-precision gradients are rounded anew when scaled: independent errors, of which the norms see the mean
        eps = [*map(_eps, map(attrgetter("dtype"), held))]
        resolution: float | Tensor = eps[0]
        if eps.count(eps[0]) < len(eps):
            resolution = torch.tensor(eps, dtype=scale.dtype).to(scale.device, non_blocking=True)
        edited = (l1_now - scale * l1).abs() > (1e-4 + resolution) * l1_now + (l2 == 0) * l1_now
        return Changes(list(self.tensors), scale, edited, ~l1_now.isfinite(), reached)


class GradientWatch:
    """Takes the fingerprint of a model's gradients at the end of each backward pass in which a recorded gradient arrived.

    A backward pass may also begin on gradients that were cleared since the last one, without a step: a scaler skipped it, or
    the loop went on to the next batch. ``on_cleared`` is told so, before anything is added to them. On gradients that were
    changed otherwise it may not begin: that raises ValueError there.
    """

    def __init__(self, params: Mapping[str, Tensor], world: World | None = None):
        self.params, self.world = params, world or World()
        self.on_cleared: Callable[[], None] = _nothing
        self.ended = 0  # backward passes
        self.fingerprint: Fingerprint | None = None
        self._tasks: set[int] = set()  # backward passes whose end is awaited
        self._looked = False  # whether the beginning of the next backward pass was looked at
        self._beginnings: list[Any] = []  # hooks on the parameters' nodes in the graph, which live as long as these are held

    def grads(self) -> dict[str, Tensor]:
        """The gradients as they are now."""
        grads = gradients(self.params)
        return dict(zip(grads, self.world.parts(grads.values()), strict=True))

    def forward_begins(self) -> None:
        self._tasks.clear()
        self._looked = False

    def await_beginnings(self) -> None:
        """The gradients hold something already: what begins on them from now on is looked at."""
        if self._beginnings or self.world.sharded:  # fully_shard sets gradients itself
            return
        with torch.enable_grad():
            # not hooks on the parameters, which torch.autograd.grad would call as well
            grad_fns = [p.expand_as(p).grad_fn for p in self.params.values()]
            nodes = [fn.next_functions[0][0] for fn in grad_fns if fn is not None]
        self._beginnings = [(node, node.register_prehook(self._begins)) for node in nodes if node is not None]

    def remove(self) -> None:
        """Takes its hooks off and forgets."""
        for _, handle in self._beginnings:
            handle.remove()
        self._beginnings, self.fingerprint, self.on_cleared = [], None, _nothing

    def _begins(self, grads: tuple) -> None:
        if self._looked or self.fingerprint is None:
            return
        self._looked, now = True, self.grads()
        if self.fingerprint.cleared(now):
            self.fingerprint = None
            self.on_cleared()
        elif not self.fingerprint.untouched(now):
            self.fingerprint = None
            raise ValueError("gradients were changed between two micro-batches of a step: scale or clip them once, before the step")

    def arrived(self) -> None:
        """A recorded gradient has come, in the midst of a backward pass."""
        task = torch._C._current_graph_task_id()
        if task not in self._tasks:
            self._tasks.add(task)
            # who averages gradients over processes does so at the pass's end, too, and comes first
            end = torch.autograd.Variable._execution_engine.queue_callback
            end(lambda: end(self._ended))

    def _ended(self) -> None:
        self.ended += 1
        self._looked = False
        grads = self.grads()
        if grads:
            self.fingerprint = Fingerprint.of(grads)


class Arrivals:
    """Told of every gradient that comes of one micro-batch, it tells the watch."""

    def __init__(self, watch: GradientWatch):
        self._watch = watch
        self.last: int | None = None  # how many backward passes had ended when the last one came; None: none came

    def __call__(self, grad: Tensor | None = None) -> None:
        self.last = self._watch.ended
        self._watch.arrived()


def _nothing() -> None:
    pass
