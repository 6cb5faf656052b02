"""Follows the batch through a forward pass: which dimension of which tensor counts the samples.

A module call is attributed sample by sample along that dimension. Sizes alone cannot tell it: a position embedding called
on ``arange(T)`` looks like a batch when ``T == n``. So tags follow the data, from the model's inputs through every torch
function that Python calls. What no rule knows, and what mixes samples (a mean over the batch, a flip of it, a product of
samples with samples), loses its tag and is marked as lost: it is never guessed at again.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.capture import rules

Tag = tuple[int, int]  # (axis, rows): size(axis) == n * rows, sample i at rows i*rows .. (i+1)*rows


class Batch:
    """Tags of the tensors of one forward pass; ``n`` is known from the first call on."""

    def __init__(self):
        self.n: int | None = None
        self._tags = WeakIdKeyDictionary()  # None marks a lost tensor

    def __getitem__(self, x: Tensor) -> Tag | None:
        return self._tags.get(x)

    def __contains__(self, x: Tensor) -> bool:
        """Whether it is known where the batch is in ``x``, or that it is lost."""
        return x in self._tags

    def lost(self, x: Tensor) -> bool:
        return x in self._tags and self._tags[x] is None

    def fits(self, x: Tensor, tag: Tag) -> bool:
        return tag[0] < x.ndim and x.shape[tag[0]] == self.n * tag[1]

    def tag(self, x: Tensor, tag: Tag | None) -> None:
        """Tags ``x`` if the tag fits its shape. Without one, ``x`` is lost if it has a graph that scores would follow."""
        if tag is not None and self.fits(x, tag):
            self._tags[x] = tag
        elif x.requires_grad:
            self._tags[x] = None
        else:
            self._tags.pop(x, None)

    def tag_unseen(self, x: Tensor) -> None:
        """Tags a tensor made in sight of no function by its first dimension, if that fits and the second does not look alike."""
        alike = self.n > 1 and x.ndim > 2 and x.shape[1] == self.n
        self.tag(x, None if alike else (0, 1))

    def infer(self, func, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Tag | None:
        """The tag of ``out = func(*args, **kwargs)``, of which ``tensors`` are all tensor arguments."""
        if any(self.lost(t) for t in tensors):
            return None
        name = getattr(func, "__name__", "")
        if name == "__get__":  # x.T, x.mT and the like; other properties are not tensors
            name = rules.PROPERTIES.get(func, "detach")
        if not args and "input" in kwargs:
            args = (kwargs["input"],)
        kwargs = {k: x for k, x in kwargs.items() if k not in ("input", "out")}
        try:
            tag = self._infer(name, args, kwargs, tensors, out)
        except (TypeError, ValueError, IndexError, RuntimeError):  # called in a way that no rule foresees
            return None
        return tag if tag is not None and tag[0] >= 0 and self.fits(out, tag) else None

    def _infer(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Tag | None:
        if name in rules.MIXING:
            return None
        if name in rules.PRODUCTS:
            rule, tagged = rules.PRODUCTS[name], self._tagged(tensors)
            tags = {
                (rule(i, self[t][0], out, *args, **kwargs), self[t][1])
                for i, t in enumerate(tensors)
                if any(t is x for x in tagged)
            }
            return tags.pop() if len(tags) == 1 and None not in next(iter(tags)) else None
        if name == "__setitem__":
            return self._written(*args)
        x = args[0] if args else None
        if not (name in rules.RULES or name in rules.RESHAPES) or (name in ("max", "min") and len(tensors) == 2):
            return self._aligned(tensors, out)
        if isinstance(x, (list, tuple)):
            x = next(t for t in tensors if self[t])
            if any(self[t] not in (None, self[x]) for t in tensors):
                return None
        if self[x] is None:
            table = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype not in (torch.bool, torch.uint8)
            return self[args[1]] if table else None  # rows of a table, one per element of the index
        axis, rows = self[x]
        if name in rules.RESHAPES:
            return self._reshaped(x, axis, out)
        axis = rules.RULES[name](x, axis, out, *args[1:], **kwargs)
        return None if axis is None else (axis, rows)

    def _tagged(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those whose tags count: a constant may have been taken for a batch by its size, a tensor with a graph was not."""
        tagged = [t for t in tensors if self[t]]
        return [t for t in tagged if t.requires_grad] or tagged

    def _aligned(self, tensors: list[Tensor], out: Tensor) -> Tag | None:
        """By shape: elementwise functions align dimensions from the right; others keep theirs, or append some."""
        tagged = [t for t in tensors if self[t]]
        source = max(tagged, key=lambda t: t.ndim)
        if out.shape != source.shape or len(tagged) > 1:
            try:
                elementwise = torch.broadcast_shapes(*(t.shape for t in tensors)) == out.shape
            except RuntimeError:
                elementwise = False
            if elementwise:
                tags = {(self[t][0] + out.ndim - t.ndim, self[t][1]) for t in self._tagged(tensors)}
                return tags.pop() if len(tags) == 1 else None
        if out.ndim == source.ndim or (out.ndim > source.ndim and out.shape[: source.ndim] == source.shape):
            return self[source]
        return None

    def _reshaped(self, x: Tensor, axis: int, out: Tensor) -> Tag | None:
        """Row-major reshapes keep a sample's elements together as long as the dimensions before the batch stay."""
        if out.numel() != x.numel() or out.shape[:axis] != x.shape[:axis] or out.ndim <= axis or out.shape[axis] % self.n:
            return None
        return axis, out.shape[axis] // self.n

    def _written(self, target: Tensor, index, value) -> Tag | None:
        """The one dimension of ``target`` that its part at ``index`` shows where ``value`` has its samples."""
        if not isinstance(value, Tensor) or self[value] is None:
            return self[target]
        axis, rows = self[value]
        axis += torch.empty(target.shape, device="meta")[index].ndim - value.ndim
        places = range(target.ndim) if self[target] is None else [self[target][0]]
        found = [a for a in places if target.shape[a] == self.n * rows and rules.getitem(target, a, target, index) == axis]
        return (found[0], rows) if len(found) == 1 else None
