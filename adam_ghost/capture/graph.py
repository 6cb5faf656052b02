"""The autograd graph behind a model's outputs, by which a step is known to be like an earlier one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adam_ghost.capture.leaves import leaves_of

# attributes of the graph's nodes by which samples could change places, as far as they do not grow with the data
_DIMENSIONS = ("dim", "dims", "dim0", "dim1", "axis0", "axis1", "dimension", "source", "destination", "shifts")

_READ: dict[type, tuple[str, ...]] = {}  # per kind of node, which of its attributes are looked at


def _attributes(kind: type) -> tuple[str, ...]:
    if kind not in _READ:
        saved = (*(f"_saved_{name}" for name in _DIMENSIONS), "_saved_indices", "variable")
        _READ[kind] = tuple(name for name in saved if hasattr(kind, name))
    return _READ[kind]


def graph_of(output: Any, names: Mapping[Tensor, str]) -> tuple[tuple[Any, ...], list[Any]]:
    """The autograd graph behind a model's outputs: kinds of nodes, their dimensions, the parameters, and how they hang together;
    and the nodes in their order.
    """
    found: list[Any] = []
    places: dict[Any, int] = {}
    waiting: list[Any] = [(x.grad_fn, 0) for x in leaves_of(output) if isinstance(x, Tensor)]
    read, named, tell = _READ, names.get, found.append
    new = 0
    while waiting:
        node, _ = waiting.pop()
        if node is None:
            tell(None)
        elif node in places:
            tell(places[node])
        else:
            places[node] = new
            new += 1
            kind = type(node)
            tell(kind)
            for name in read[kind] if kind in read else _attributes(kind):
                value = getattr(node, name)
                if name == "variable":
                    value = named(value)
                elif name == "_saved_indices":
                    value = _which(value)
                tell(value)
            waiting += node.next_functions
    return tuple(found), list(places)


def keep_apart(nodes: Sequence[Any], reshapes: Sequence[tuple[int, int]], n: int) -> bool:
    """Whether ``reshapes``, nodes and the dimension of ``n`` samples in each, are made within every sample.

    As ``Batch`` knows reshapes, but in a loop that calls nothing: every step pays for it.
    """
    for i, axis in reshapes:
        before, after = [*nodes[i]._saved_self_sym_sizes], [*nodes[i]._input_metadata[0].shape]
        if before[:axis] != after[:axis] or before[axis] % n or not after[axis:] or after[axis] % n:
            return False
    return True


def _which(indices: Any) -> tuple[bool, ...]:
    """Which dimensions ``x[indices]`` went along; an embedding's indices are one tensor, and no dimensions."""
    return tuple(x is None for x in indices) if isinstance(indices, tuple) else ()
