"""What a module's code may read and write besides arguments, parameters and buffers: kept, so that running it leaves no trace."""

import copy
import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_OWN = set(vars(nn.Module()))  # what every module holds: parameters, hooks and so on are taken care of elsewhere
_MUTABLE = {list, dict, set, deque, OrderedDict, defaultdict, Counter, random.Random}
_ATOMS = {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device}
_LARGEST = 1 << 20  # elements of a tensor kept: larger ones are tables

RandomState = tuple[Any, Any]


def random_state() -> RandomState:
    """Where Python's and NumPy's random streams are."""
    return random.getstate(), np.random.get_state()


def set_random_state(state: RandomState) -> None:
    python, numpy = state
    random.setstate(python)
    np.random.set_state(numpy)


def plain_state(state: RandomState) -> RandomState:
    """The state in plain values."""
    python, (kind, keys, *rest) = state
    return python, (kind, np.asarray(keys).tolist(), *rest)


def state_of_plain(state: RandomState) -> RandomState:
    """Of what ``plain_state`` returned, tuples of which may have come back as lists."""
    (version, inner, gauss), numpy = state
    return (version, tuple(inner), gauss), tuple(numpy)


def custom_modules(root: nn.Module) -> list[nn.Module]:
    """The modules of a tree that run code of unknown effects: all but PyTorch's own."""
    return [m for m in root.modules() if is_custom(m)]


def is_custom(module: nn.Module) -> bool:
    cls: Any = type(module)
    return _is_custom(cls)


@functools.cache
def _is_custom(cls: Any) -> bool:
    # fully_shard puts a class of PyTorch's before the module's own
    return any(not kind.__module__.startswith(("torch.", "builtins")) for kind in cls.__mro__)


class Surroundings:
    """The plain attributes of modules, with the contents of lists, dicts, sets and tensors among them, and the random streams.

    Code that keeps its state elsewhere (a global, a file, another object) is not followed there.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._modules = list(modules)
        self._attributes = [{k: _copy(x) for k, x in _plain(m).items()} for m in self._modules]
        self._random = random_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside the block everything is as it was then; afterwards, as it is now."""
        with kept(self._modules):
            for module, held in zip(self._modules, self._attributes, strict=True):
                vars(module).update({k: _copy(x) for k, x in held.items()})
            set_random_state(self._random)
            yield


@contextmanager
def kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After the block the modules' attributes and the random streams are as before it.

    Inside, attributes are copies: what changes them in place does not reach the module's own.
    """
    now = [(module, _plain(module)) for module in modules]
    streams = random_state()
    try:
        for module, held in now:
            vars(module).update({k: _copy(x) for k, x in held.items() if type(x) not in _ATOMS})
        yield
    finally:
        for module, held in now:
            own = vars(module)
            for name in own.keys() - held.keys() - _OWN:
                del own[name]
            own.update(held)
        set_random_state(streams)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {k: x for k, x in vars(module).items() if k not in _OWN}


def _copy(x: Any) -> Any:
    """A copy of a value that can change in place; any other value itself."""
    if isinstance(x, Tensor):
        # one with a graph is of this pass alone, and parameters are taken care of elsewhere
        return x.clone() if not x.requires_grad and x.numel() <= _LARGEST else x
    if isinstance(x, np.ndarray):
        return x.copy() if x.size <= _LARGEST else x
    if isinstance(x, torch.Generator):
        return x.clone_state()
    if isinstance(x, np.random.Generator):
        return copy.deepcopy(x)
    return copy.copy(x) if type(x) in _MUTABLE else x
