"""A model's modules and parameters in ``torch.nn``'s order, in a fifth of the time that its own generators take."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

from torch import nn

from adam_ghost.same import same

_PARAMETERS, _MODULES = attrgetter("_parameters"), attrgetter("_modules")
_KEYS, _VALUES = methodcaller("keys"), methodcaller("values")  # a scripted module has no dicts


class Tree:
    """A model's modules and parameters, walked again only after one was put in, taken out or exchanged."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules: list[nn.Module] = []
        self._named: dict[str, nn.Parameter] = {}
        self._sizes: list[int] = []  # how many parameters each module held, and how many modules
        self._held: list[Any] = []  # these, and their names
        self._steady = False

    @contextmanager
    def steady(self) -> Iterator[list[nn.Module]]:
        """Gives the modules. Inside, this look serves: no code runs that could exchange one, or ``stir`` is told of it."""
        modules = self.modules()
        outer, self._steady = self._steady, True
        try:
            yield modules
        finally:
            self._steady = outer

    def stir(self) -> None:
        """Code of unknown effects ran."""
        self._steady = False

    def look(self) -> tuple[list[nn.Module], dict[str, nn.Parameter]]:
        """``list(model.modules())`` and ``dict(model.named_parameters())``; the same objects while nothing was exchanged."""
        if self._steady:
            return self._modules, self._named
        sizes, held = _held(self._modules)
        if not held or sizes != self._sizes or not same(held, self._held):
            self._modules, self._named = modules(self._model), named_parameters(self._model)
            self._sizes, self._held = _held(self._modules)
        return self._modules, self._named

    def modules(self) -> list[nn.Module]:
        return self.look()[0]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.look()[1]


def _held(modules: list[nn.Module]) -> tuple[list[int], list[Any]]:
    dicts = [*map(_PARAMETERS, modules), *map(_MODULES, modules)]
    full = [*filter(None, dicts)]
    names = chain.from_iterable(full if {*map(type, full)} == {dict} else map(_KEYS, full))
    return [*map(len, dicts)], [*names, *chain.from_iterable(map(_VALUES, full))]


def modules(model: nn.Module) -> list[nn.Module]:
    """As ``list(model.modules())``."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                waiting.extend(reversed(module._modules.values()))
    return list(found)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """As ``dict(model.named_parameters())``."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    visited: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module is None or id(module) in visited:
            continue
        visited.add(id(module))
        for name, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                found[prefix + name] = p
        if module._modules:
            waiting.extend((f"{prefix}{name}.", child) for name, child in reversed(module._modules.items()))
    return found
