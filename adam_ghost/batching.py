"""Follows the batch through a forward pass: which dimension of which tensor counts the samples.

A module call is attributed sample by sample along that dimension. Sizes alone cannot tell it: a position embedding called
on ``arange(T)`` looks like a batch when ``T == n``. So tags follow the data, from the model's inputs through every torch
function that Python calls; what no rule below knows loses its tag.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Tag = tuple[int, int]  # (axis, rows): size(axis) == n * rows, sample i at rows i*rows .. (i+1)*rows


class Batch:
    """Tags of the tensors of one forward pass; ``n`` is known from the first call on."""

    def __init__(self):
        self.n: int | None = None
        self._tags = WeakIdKeyDictionary()

    def __getitem__(self, x: Tensor) -> Tag | None:
        return self._tags.get(x)

    def tag(self, x: Tensor, tag: Tag | None) -> None:
        """Tags ``x`` if the tag fits its shape."""
        if tag is not None and tag[0] < x.ndim and x.shape[tag[0]] == self.n * tag[1]:
            self._tags[x] = tag
        else:
            self._tags.pop(x, None)

    def infer(self, func, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Tag | None:
        """The tag of ``out = func(*args, **kwargs)``, of which ``tensors`` are all tensor arguments."""
        source = max((t for t in tensors if self[t]), key=lambda t: t.ndim)
        axis, rows = self[source]
        name = getattr(func, "__name__", "")
        if name == "__get__":  # x.T, x.mT and the like; other properties are not tensors
            name = {torch.Tensor.T.__get__: "t", torch.Tensor.mT.__get__: "mT"}.get(func, "detach")
        if (rule := _RULES.get(name)) is not None:
            axis = rule(source, axis, *args[1:], **kwargs)
        elif name in _REDUCTIONS:
            axis = _reduced(source, axis, *args[1:], **kwargs)
        elif name in _RESHAPES:
            return self._reshaped(source, axis, out)
        elif name != "embedding" and out.ndim <= max(t.ndim for t in tensors):
            axis += out.ndim - source.ndim  # broadcasting aligns dimensions from the right
        if axis is None or not 0 <= axis < out.ndim or out.shape[axis] % self.n:
            return None
        if out.shape[axis] != self.n * rows:
            return None
        return axis, rows

    def _reshaped(self, x: Tensor, axis: int, out: Tensor) -> Tag | None:
        """Row-major reshapes keep a sample's elements together as long as the dimensions before the batch stay."""
        if out.numel() != x.numel() or out.shape[:axis] != x.shape[:axis] or out.ndim <= axis or out.shape[axis] % self.n:
            return None
        return axis, out.shape[axis] // self.n


def _permute(x, axis, *dims, **kwargs):
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return [d % x.ndim for d in dims].index(axis)


def _swap(x, axis, d0, d1):
    d0, d1 = d0 % x.ndim, d1 % x.ndim
    return {d0: d1, d1: d0}.get(axis, axis)


def _move(x, axis, source, destination):
    return torch.empty([7 if d == axis else 1 for d in range(x.ndim)], device="meta").movedim(source, destination).shape.index(7)


def _getitem(x, axis, index):
    """Where the batch dimension lands, None if it is indexed by anything but a full slice."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, (Tensor, list)) for i in index) and not all(isinstance(i, (slice, Tensor)) for i in index[: axis + 1]):
        return None  # advanced indices before the batch may move it
    used = sum(i is not None and i is not Ellipsis for i in index)
    if any(i is Ellipsis for i in index):
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        index[at : at + 1] = [slice(None)] * (x.ndim - used)
    dim = place = 0
    for i in index:
        if i is None:
            place += 1
            continue
        if dim == axis:
            return place if isinstance(i, slice) and i.indices(x.shape[axis]) == (0, x.shape[axis], 1) else None
        dim += 1
        place += not isinstance(i, int)
    return place + axis - dim


def _select(x, axis, dim, *_, **__):
    dim %= x.ndim
    return None if dim == axis else axis - (dim < axis)


def _squeeze(x, axis, dim=None):
    dims = range(x.ndim) if dim is None else ([dim] if isinstance(dim, int) else dim)
    gone = {d % x.ndim for d in dims if x.shape[d] == 1}
    return None if axis in gone else axis - sum(d < axis for d in gone)


def _unsqueeze(x, axis, dim):
    return axis + (dim % (x.ndim + 1) <= axis)


def _stack(x, axis, tensors=None, dim=0, **_):
    dim = tensors if isinstance(tensors, int) else dim
    return axis + (dim % (x.ndim + 1) <= axis)


def _reduced(x, axis, dim=None, keepdim=False, **kwargs):
    dim = kwargs.get("axis", dim)
    if dim is None or not isinstance(dim, (int, tuple, list)):
        return None
    dims = {d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)}
    return None if axis in dims else axis - (0 if keepdim else sum(d < axis for d in dims))


def _transposed_last(x, axis):
    return _swap(x, axis, -1, -2) if x.ndim > 1 else axis


_RULES = {
    "permute": _permute,
    "transpose": _swap,
    "swapaxes": _swap,
    "swapdims": _swap,
    "movedim": _move,
    "moveaxis": _move,
    "t": _transposed_last,
    "mT": _transposed_last,
    "__getitem__": _getitem,
    "select": _select,
    "unbind": _select,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "stack": _stack,
}
_REDUCTIONS = {
    "sum",
    "mean",
    "prod",
    "amax",
    "amin",
    "max",
    "min",
    "norm",
    "var",
    "std",
    "logsumexp",
    "argmax",
    "argmin",
    "median",
}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"}
