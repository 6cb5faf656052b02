"""Follows the batch through a forward pass: which dimension of which tensor counts the samples.

A module call is attributed sample by sample along that dimension. Sizes alone cannot tell it: a position embedding called
on ``arange(T)`` looks like a batch when ``T == n``. So tags follow the data, from the model's inputs through every torch
function that Python calls: elementwise ones, and those that have a rule. What no rule knows, and what mixes samples (a mean
over the batch, a flip of it, a product of samples with samples), loses its tag and is marked as lost: nothing is guessed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.capture import rules
from adam_ghost.capture.declared import DECLARED, is_opaque
from adam_ghost.capture.pointwise import POINTWISE, POINTWISE_IF_TWO

Tag = tuple[int, int]  # (axis, rows): size(axis) == n * rows, sample i at rows i*rows .. (i+1)*rows

_FIRST = ("input", "tensor", "tensors", "self", "A", "logits", "x")  # what torch calls the first argument
_UNKNOWN = (-1, -1)


class Batch:
    """Tags of the tensors of one forward pass; ``n`` is known from the first call on."""

    def __init__(self):
        self.n = -1  # until then
        self._tags = WeakIdKeyDictionary()  # None marks a lost tensor
        self.nodes: set[Any] = set()  # of the graph, at which samples passed

    def __getitem__(self, x: Tensor) -> Tag | None:
        return None if self.lost(x) else self._tags.get(x)

    def __contains__(self, x: Tensor) -> bool:
        """Whether it is known where the batch is in ``x``, or that it is lost."""
        return self._tags.get(x) is not None or self.lost(x)

    def lost(self, x: Tensor) -> bool:
        """Whether samples are in ``x`` that cannot be told apart, where scores would follow its graph.

        While gradients are off, as when a reentrant checkpoint first runs, the graph may come later.
        """
        if not x.requires_grad and torch.is_grad_enabled():
            return False
        tag = self._tags.get(x, _UNKNOWN)
        base = x._base
        if tag is None or (base is not None and self._tags.get(base, _UNKNOWN) is None):
            return True
        return tag is not _UNKNOWN and is_opaque(x.grad_fn)

    def fits(self, x: Tensor, tag: Tag) -> bool:
        return tag[0] < x.ndim and x.shape[tag[0]] == self.n * tag[1]

    def tag(self, x: Tensor, tag: Tag | None) -> None:
        """Tags ``x`` if the tag fits its shape. Without one ``x`` is lost, unless it is a constant for good."""
        if tag is not None and self.fits(x, tag):
            self._tags[x] = tag
        elif x.requires_grad or not torch.is_grad_enabled():
            self._tags[x] = None
        else:
            self._tags.pop(x, None)
        if x.grad_fn is not None:
            self.nodes.add(x.grad_fn)

    def made_by(self, node: Any, output: int) -> Tensor | None:
        """The tagged tensor that is this output of a node of the graph."""
        for x in self._tags:
            if x.grad_fn is node and x.output_nr == output:
                return x
        return None

    def reached_from(self, x: Tensor) -> tuple[bool, list[Tensor]]:
        """Whether samples passed anywhere in the graph of ``x``, and the leaves of the graph that were visited."""
        found, leaves, visited = [x.grad_fn], [], set()
        while found:
            node = found.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            if node in self.nodes or (leaf is not None and leaf in self):
                return True, leaves
            found += [parent for parent, _ in node.next_functions]
        return False, leaves

    def hidden_on_the_way_to(self, x: Tensor) -> bool:
        """Whether samples may have passed a custom function whose doings are unknown, after they were last seen."""
        found, visited = [x.grad_fn], set()
        while found:
            node = found.pop()
            if node is None or node in visited or node in self.nodes:
                continue
            visited.add(node)
            if is_opaque(node):
                return True
            found += [parent for parent, _ in node.next_functions]
        return False

    def infer(self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Tag | None:
        """The tag of ``out = func(*args, **kwargs)``, of which ``tensors`` are all arguments that may carry samples."""
        if any(self.lost(t) for t in tensors):
            return None
        kwargs = {k: x for k, x in kwargs.items() if k != "out"}
        try:
            found = {self._land(func, args, kwargs, x, tag, tensors, out) for x, tag in self.tagged(tensors)}
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # called in a way that no rule foresees
            return None
        tag = found.pop() if len(found) == 1 else None
        return tag if tag is not None and tag[0] >= 0 and self.fits(out, tag) else None

    def tagged(self, tensors: list[Tensor]) -> list[tuple[Tensor, Tag]]:
        """Those whose tags count: a constant may have been taken for a batch by its size, a tensor with a graph was not."""
        tagged = [(t, tag) for t in tensors if (tag := self[t])]
        return [(t, tag) for t, tag in tagged if t.requires_grad] or tagged

    def _land(
        self, func: Callable, args: tuple, kwargs: dict, x: Tensor, tag: Tag, tensors: list[Tensor], out: Tensor
    ) -> Tag | None:
        """Where the samples of one argument, ``x``, are in ``out``."""
        axis, rows = tag
        if func in POINTWISE or (func in POINTWISE_IF_TWO and len(tensors) == 2):
            # broadcasting aligns dimensions from the right; a loss that was reduced has another shape
            elementwise = torch.broadcast_shapes(*(t.shape for t in tensors)) == out.shape
            return (axis + out.ndim - x.ndim, rows) if elementwise else None
        if func in DECLARED:
            return tag
        if func is Tensor.__setitem__:
            return self._written(*args)
        if func in rules.PRODUCTS:
            rule, names, carriers = rules.PRODUCTS[func]
            bound, kwargs = rules.bind(names, args, kwargs)
            places = {rule(i, axis, out, *bound, **kwargs) for i in carriers if i < len(bound) and _holds(bound[i], x)}
            return _the_one(places, rows)
        if func in rules.EINSUM:
            operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            return _the_one({rules.einsum(args[0], operands, i, axis, out) for i, t in enumerate(operands) if t is x}, rows)
        name = next((name for name in _FIRST if name in kwargs), None)
        if not args and name is not None:
            args, kwargs = (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
        if func in rules.LISTS:
            return _the_one({rules.LISTS[func](args[0], axis, out, *args[1:], **kwargs)}, rows)
        if x is not args[0]:
            table = func is Tensor.__getitem__ and x is args[1] and x.dtype not in (torch.bool, torch.uint8)
            return tag if table and args[0] not in self else None  # rows of a table, one per element of the index
        if func in rules.RESHAPES:
            return self._reshaped(x, axis, out)
        return _the_one({rules.RULES[func](x, axis, out, *args[1:], **kwargs)}, rows) if func in rules.RULES else None

    def _reshaped(self, x: Tensor, axis: int, out: Tensor) -> Tag | None:
        """Row-major reshapes keep a sample's elements together as long as the dimensions before the batch stay."""
        n = max(self.n, 1)  # of an empty batch everything is a multiple
        if out.numel() != x.numel() or out.shape[:axis] != x.shape[:axis] or out.ndim <= axis or out.shape[axis] % n:
            return None
        return axis, out.shape[axis] // n

    def _written(self, target: Tensor, index: Any, value: Any) -> Tag | None:
        """The one dimension of ``target`` that its part at ``index`` shows where ``value`` has its samples."""
        own, tag = self[target], self[value] if isinstance(value, Tensor) else None
        if tag is None:
            return own
        axis, rows = tag
        axis += torch.empty(target.shape, device="meta")[index].ndim - value.ndim
        places = range(target.ndim) if own is None else [own[0]]
        found = [a for a in places if target.shape[a] == self.n * rows and rules.getitem(target, a, target, index) == axis]
        return (found[0], rows) if len(found) == 1 else None


def _holds(argument: Any, x: Tensor) -> bool:
    return argument is x or (isinstance(argument, (list, tuple)) and any(y is x for y in argument))


def _the_one(places: set[int | None], rows: int) -> Tag | None:
    axis = places.pop() if len(places) == 1 else None
    return None if axis is None else (axis, rows)
