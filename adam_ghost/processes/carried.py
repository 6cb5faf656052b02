"""Directions that ride with the weights of ``fully_shard``: gathered after these in a backward pass, freed with them.

Who gathers a unit's weights for its backward pass, or ahead of it, gathers its directions too; so all processes do, in the order in
which they do that.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Gather = Callable[[Mapping[str, Tensor], Sequence[str]], tuple[Tensor, Any]]
Join = Callable[[Mapping[str, Tensor], Sequence[str], Tensor], dict[str, Tensor]]


class Carried(Mapping[str, Tensor]):
    """By name, whole directions ``[K, *shape]``, of which ``parts`` are this process's; there while their unit's weights are.

    ``units``: the parameter groups of ``fully_shard``, with their parameters' names; ``gather`` sends off parts, ``join`` makes
    whole ones of what came.
    """

    def __init__(self, parts: Mapping[str, Tensor], units: Sequence[tuple[Any, list[str]]], gather: Gather, join: Join):
        self.parts, self._gather, self._join = parts, gather, join
        self._groups = [group for group, _ in units]
        self._names = [[name for name in names if name in parts] for _, names in units]
        self._unit_of = {name: i for i, names in enumerate(self._names) for name in names}
        self._coming: dict[int, tuple[Tensor, Any]] = {}
        self._whole: dict[int, dict[str, Tensor]] = {}
        self._waiting: list[tuple[set[int], Callable[[], None]]] = []
        for i, group in enumerate(self._groups):
            if self._names[i]:
                # in the instance's place of the methods: whoever calls them finds these
                group.unshard = partial(self._unshard, i, group.unshard)
                group.pre_backward = partial(self._pre_backward, i, group.pre_backward)
                group.post_backward = partial(self._post_backward, i, group.post_backward)

    def end(self) -> None:
        """Takes itself off the units. Raises RuntimeError where something waits for directions that never came."""
        for group in self._groups:
            for method in ("unshard", "pre_backward", "post_backward"):
                vars(group).pop(method, None)
        for i in [*self._coming]:
            self._drop(i)
        self._whole.clear()
        waiting, self._waiting = self._waiting, []
        if waiting:
            raise RuntimeError("a backward pass brought gradients of layers whose weights fully_shard never gathered for it")

    def __getitem__(self, name: str) -> Tensor:
        i = self._unit_of[name]
        self._arrive(i)
        if i not in self._whole:
            raise RuntimeError(f"the direction of '{name}' is not there: its layer ran backward without its fully_shard unit")
        return self._whole[i][name]

    def __contains__(self, name: object) -> bool:
        return name in self._unit_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._unit_of)

    def __len__(self) -> int:
        return len(self._unit_of)

    def when_whole(self, names: Collection[str], do: Callable[[], None]) -> None:
        """Calls ``do`` when the directions of ``names`` are whole: now, or in the course of the backward pass."""
        self._waiting.append(({self._unit_of[name] for name in names}, do))
        self._go_on()

    def _go_on(self) -> None:
        ready = [do for units, do in self._waiting if units <= self._whole.keys()]
        self._waiting = [(units, do) for units, do in self._waiting if not units <= self._whole.keys()]
        for do in ready:
            do()

    # in the place of the groups' own methods

    def _unshard(self, i: int, unshard: Callable, *args: Any, **kwargs: Any) -> None:
        unshard(*args, **kwargs)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and i not in self._coming and i not in self._whole:
            self._coming[i] = self._gather(self.parts, self._names[i])

    def _pre_backward(self, i: int, pre_backward: Callable, *args: Any) -> None:
        pre_backward(*args)
        self._arrive(i)

    def _post_backward(self, i: int, post_backward: Callable, *args: Any) -> None:
        post_backward(*args)
        self._drop(i)
        self._whole.pop(i, None)

    def _arrive(self, i: int) -> None:
        if i in self._coming:
            gathered, work = self._coming.pop(i)
            work.wait()
            self._whole[i] = self._join(self.parts, self._names[i], gathered)
            self._go_on()

    def _drop(self, i: int) -> None:
        if i in self._coming:
            self._coming.pop(i)[1].wait()
