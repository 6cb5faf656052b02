"""Rows of any order: whose they are, told by an index that goes along when they are moved, selected, routed and written back.

The index of a tensor has as many dimensions as it, of size 1 where all that lies along one belongs together: it broadcasts to
the tensor. What moves elements moves the index in the same way; nothing of it needs the host.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.capture.names import functions

NOBODY = -1


class Packing(NamedTuple):
    """Samples packed in rows: sample ``i`` is the tokens ``offsets[i]:offsets[i + 1]`` of all rows in a line, or in ``order``."""

    offsets: Tensor  # [n + 1], on the batch's device
    tokens: int  # of the rows, or where the last sample ends, known to the host
    order: Tensor | None = None  # [tokens], of the tokens, in which the samples lie in a line; None: they do
    of: Tensor | None = None  # [tokens], the sample of each where ``order`` is given

    @classmethod
    def by_index(cls, of: Tensor, n: int) -> "Packing":
        """Of rows of tokens whose samples ``of`` tells, ``NOBODY``'s where they are padding."""
        of = of.flatten()
        line, order = torch.sort(torch.where(of == NOBODY, n, of), stable=True)
        return cls(torch.searchsorted(line, torch.arange(n + 1, device=of.device)), len(of), order, of)

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    def sample_of(self, token: Tensor) -> Tensor:
        """The samples of tokens, by their places in the line of all rows; ``NOBODY``'s where they are behind the last one."""
        if self.of is not None:
            return torch.where(token == NOBODY, NOBODY, self.of[token.clamp(min=0)])
        found = torch.searchsorted(self.offsets, token, right=True) - 1
        return torch.where((token == NOBODY) | (found >= self.samples), NOBODY, found)


def find_packing(offsets: Tensor | None, samples: Tensor | None, device: torch.device, n: int | None = None) -> Packing | None:
    """How ``n`` samples are packed in rows, as the user tells; None where a row is a sample.

    Raises TypeError for what is no tensor, ValueError where both are told, or one of another shape or type, or (on the CPU, where
    looking costs no synchronisation) offsets that fall.
    """
    given = offsets if samples is None else samples
    if given is None:
        return None
    name = "offsets" if samples is None else "samples"
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(given).__name__}")
    if offsets is not None and samples is not None:
        raise ValueError("samples packed in rows are told by offsets or by samples, got both")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {given.dtype}")
    moved = given.to(device, torch.int64, non_blocking=True)
    if samples is not None:
        n = int(given.max()) + 1 if n is None else n
        # elsewhere, looking would wait for the device
        if given.device.type == "cpu" and given.numel() and not -1 <= int(given.min()) <= int(given.max()) < n:
            raise ValueError(f"samples must be -1 to {n - 1}, got {int(given.min())} to {int(given.max())}")
        return Packing.by_index(moved, n)
    if given.ndim != 1 or len(given) < 2 or (n is not None and len(given) != n + 1):
        size, count = ("n + 1", "n") if n is None else (n + 1, n)
        raise ValueError(f"offsets must be [{size}] integers for {count} samples, got {list(given.shape)}")
    if given.device.type == "cpu" and (int(given[0]) < 0 or bool((given.diff() < 0).any())):
        raise ValueError(f"offsets must rise from 0 to the number of tokens of all rows, got {_listed(given)}")
    return Packing(moved, int(given[-1]))


def _listed(x: Tensor) -> str:
    head = ", ".join(map(str, x[:8].tolist()))
    return f"{head}, ..." if len(x) > 8 else head


class Rows:
    """The tag of a tensor whose rows are in no known order.

    ``of``: int64, broadcasts to the tensor: the place of each row in the batch, ``NOBODY``'s where it is padding. Places count
    ``per`` to a sample, in the batch's order: sample ``i`` has ``i * per`` to ``(i + 1) * per``.
    """

    def __init__(self, of: Tensor, per: int):
        self.of, self.per = of, per

    @cached_property
    def samples(self) -> Tensor:
        """``of`` by samples."""
        return self.of if self.per == 1 else self.of.div(self.per, rounding_mode="floor")

    def varies(self) -> list[int]:
        """The dimensions along which rows may belong to different places."""
        return [d for d, size in enumerate(self.of.shape) if size != 1]


def shrunk(of: Tensor) -> Tensor:
    """An index with size 1 along the dimensions that it was expanded to."""
    for d in range(of.ndim):
        if of.shape[d] > 1 and of.stride(d) == 0:
            of = of.narrow(d, 0, 1)
    return of


def _widened(of: Tensor, x: Tensor, *dims: int) -> Tensor:
    """``of`` expanded to the size of ``x`` along ``dims``."""
    dims_of_x = {d % x.ndim for d in dims}
    return of.expand([x.shape[d] if d in dims_of_x else size for d, size in enumerate(of.shape)])


# Moves: what becomes of the index ``of`` of the first argument ``x``; None where it cannot be told


def _as_it_does(func: Callable, of: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """By the function itself; what only gives a view leaves the expanded dimensions as they are."""
    return func(of.expand(x.shape), *args, **kwargs)


def _reshaped(func: Callable, of: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """By reshaping what varies alone: dimensions along which all belongs together stay 1, however they are joined or divided."""
    if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):  # ``view`` reinterprets the elements
        return None
    shape = func(torch.empty(x.shape, device="meta"), *args, **kwargs).shape
    if x.numel() == 0:
        return of.new_full((1,) * len(shape), NOBODY)
    before, after = [], []
    for old, new in _same_elements(x.shape, shape):
        together = all(of.shape[d] == 1 for d in old)
        before += [1 if together else x.shape[d] for d in old]
        after += [1 if together else shape[d] for d in new]
    return of.expand(before).reshape(after)


def _same_elements(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """The runs of dimensions of two shapes that hold the same number of elements each, as short as they can be."""
    runs: list[tuple[range, range]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second, sizes = i, j, [1, 1]
        while (i, j) == (first, second) or sizes[0] != sizes[1]:
            if j == len(after) or (i < len(before) and sizes[0] <= sizes[1]):
                sizes[0] *= before[i]
                i += 1
            else:
                sizes[1] *= after[j]
                j += 1
        runs.append((range(first, i), range(second, j)))
    return runs


def _flipped(func: Callable, of: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return func(of, *args, **kwargs)


def _rolled(func: Callable, of: Tensor, x: Tensor, shifts: Any, dims: Any = None) -> Tensor:
    return func(of.expand(x.shape), shifts) if dims is None or dims == () else func(of, shifts, dims)


def _selected_rows(func: Callable, of: Tensor, x: Tensor, dim: int, index: Tensor) -> Tensor:
    return func(_widened(of, x, dim), dim, index)


def _interleaved(func: Callable, of: Tensor, x: Tensor, repeats: Any, dim: int | None = None, **kwargs: Any) -> Tensor:
    of = of.expand(x.shape) if dim is None else _widened(of, x, dim)
    return func(of, repeats, dim, **kwargs)


def _gathered(func: Callable, of: Tensor, x: Tensor, dim: int, index: Tensor, **kwargs: Any) -> Tensor:
    dim %= x.ndim
    for d in range(x.ndim):
        if d != dim and of.shape[d] == 1:
            if index.stride(d) == 0:
                index = index.narrow(d, 0, min(1, index.shape[d]))
            else:
                of = _widened(of, x, d)
    return _widened(of, x, dim).gather(dim, index)


def _taken_along(func: Callable, of: Tensor, x: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    return func(of.expand(x.shape), indices, dim)


def plain_index(index: Any, ndim: int) -> list[Any] | None:
    """The items of an index into ``ndim`` dimensions, without an ellipsis; None if it has some of another kind."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, bool) or not isinstance(i, (int, slice, list, Tensor, type(None), type(Ellipsis))) for i in items):
        return None
    used = sum(_dims_taken(i) for i in items)
    at = next((k for k, i in enumerate(items) if i is Ellipsis), len(items))
    items[at : at + 1] = [slice(None)] * (ndim - used)
    return items


def _dims_taken(item: Any) -> int:
    """How many dimensions one item of an index stands for."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _indexed(func: Callable, of: Tensor, x: Tensor, index: Any) -> Tensor | None:
    items = plain_index(index, x.ndim)
    if items is None:
        return None
    dim, told = 0, []  # whether the tensors of the index tell rows apart
    for k, i in enumerate(items):
        taken = _dims_taken(i)
        if isinstance(i, slice) and of.shape[dim] == 1:
            items[k] = slice(0, 1)
        elif isinstance(i, (Tensor, list)):
            told.append(any(of.shape[d] > 1 for d in range(dim, dim + taken)))
        dim += taken
    if told and not any(told) and not any(_dims_taken(i) > 1 for i in items):
        # of any of them: the looked-up dimensions are expanded again
        at = [k for k, i in enumerate(items) if isinstance(i, (Tensor, list))]
        ndim = max(torch.as_tensor(items[k]).ndim for k in at)
        if not any(isinstance(items[k], Tensor) and items[k].dtype in (torch.bool, torch.uint8) for k in at):
            for k in at:
                items[k] = torch.zeros([1] * ndim, dtype=torch.int64, device=of.device)
    return of.expand(x.shape)[tuple(items)]


def _padded(func: Callable, of: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor | None:
    if mode != "constant":
        return None
    padded = [x.ndim - 1 - k // 2 for k, amount in enumerate(pad) if amount]  # in pairs, from the last dimension on
    return F.pad(_widened(of, x, *padded), pad, value=NOBODY)


def _concatenated(func: Callable, of: Tensor, x: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> Tensor:
    dim %= x.ndim
    mine = _widened(of, x, dim)
    others = lambda y: of.new_full((), NOBODY).expand([y.shape[d] if d == dim else s for d, s in enumerate(of.shape)])  # noqa: E731
    return torch.cat([mine if y is x else others(y) for y in tensors], dim)


def _stacked(func: Callable, of: Tensor, x: Tensor, tensors: Sequence[Tensor], dim: int = 0, **_: Any) -> Tensor:
    return torch.stack([of if y is x else torch.full_like(of, NOBODY) for y in tensors], dim)


def _joined(func: Callable, of: Tensor, x: Tensor, tensors: Sequence[Tensor], **kwargs: Any) -> Tensor:
    return func([of.expand(x.shape) if y is x else of.new_full((), NOBODY).expand(y.shape) for y in tensors], **kwargs)


_VIEWS = """
    select unbind narrow split split_with_sizes chunk tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes hsplit vsplit
    dsplit permute transpose swapaxes swapdims t adjoint movedim moveaxis squeeze unsqueeze expand expand_as broadcast_to
    Tensor.unfold torch.diagonal Tensor.diagonal
"""
_COPIES = "rot90 repeat tile masked_select take"

MOVES: dict[Callable, Callable] = {
    f: move
    for names, move in (
        (_VIEWS, _as_it_does),
        (_COPIES, _as_it_does),
        ("reshape view flatten unflatten view_as reshape_as ravel", _reshaped),
        ("flip fliplr flipud", _flipped),
        ("roll", _rolled),
        ("index_select", _selected_rows),
        ("repeat_interleave", _interleaved),
        ("gather", _gathered),
        ("take_along_dim", _taken_along),
        ("__getitem__", _indexed),
        ("F.pad", _padded),
    )
    for name in names.split()
    for f in functions(name)
}
MOVES |= {getattr(Tensor, name).__get__: _as_it_does for name in ("T", "mT")}

JOINS: dict[Callable, Callable] = {
    f: join
    for names, join in (
        ("cat concat concatenate", _concatenated),
        ("stack", _stacked),
        ("hstack vstack row_stack dstack column_stack", _joined),
    )
    for name in names.split()
    for f in functions(name)
}


# Writes: the places of a source's rows, ``of``, put where it is written; and what stands there, read back


def _put_rows(placed: Tensor, of: Tensor, dim: int, index: Tensor) -> Tensor:
    return placed.index_copy(dim, index, of.expand([len(index) if d == dim else s for d, s in enumerate(placed.shape)]))


def _read_rows(placed: Tensor, dim: int, index: Tensor) -> Tensor:
    return placed.index_select(dim, index)


def _put_elements(placed: Tensor, of: Tensor, dim: int, index: Tensor) -> Tensor:
    # what a source has beyond the index is not written
    of = of[tuple(slice(0, s) for s in index.shape)] if of.ndim else of
    return placed.scatter(dim, index, of.expand(index.shape))


def _read_elements(placed: Tensor, dim: int, index: Tensor) -> Tensor:
    return placed.gather(dim, index)


def _as_index(index: Any) -> Any:
    """What ``index_put`` takes as a list of tensors, as an index in brackets."""
    return tuple(index) if isinstance(index, list) and any(isinstance(i, Tensor) for i in index) else index


def _put_at(placed: Tensor, of: Tensor, index: Any) -> Tensor:
    placed = placed.clone()
    placed[_as_index(index)] = of
    return placed


def _read_at(placed: Tensor, index: Any) -> Tensor:
    return placed[_as_index(index)]


def _put_masked(placed: Tensor, of: Tensor, mask: Tensor) -> Tensor:
    return placed.masked_scatter(mask, of.expand(mask.shape).contiguous() if of.ndim == 0 else of.contiguous())


class Write(NamedTuple):
    """A function that writes a source's rows into a target: its arguments' names; the target is first, the source last."""

    names: list[str]
    put: Callable[..., Tensor]
    read: Callable[..., Tensor] | None
    adds: bool = False  # to what stands there

    def target(self, of: Tensor, out: Tensor, place: Sequence[Any]) -> Tensor:
        """The target's own index afterwards: NOBODY's where it was written over."""
        if self.adds:
            return of
        untouched = self.put(of.new_full(out.shape, 1), of.new_zeros(()), *place)
        return torch.where(untouched == 1, of, NOBODY)

    def source(self, of: Tensor, source: Tensor, out: Tensor, place: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The result's index as far as the source is concerned; the source's own, and what the result has in its place."""
        shape = list(out.shape)
        of = of.expand(source.shape)
        if self.read in (_read_rows, _read_elements) and source.ndim == out.ndim:
            place = [place[0] % out.ndim, place[1]]
            for d in range(out.ndim):
                along = place[1].stride(d) == 0 if self.read is _read_elements else True
                if d != place[0] and of.stride(d) == 0 and along and source.shape[d] == out.shape[d]:
                    of, shape[d] = of.narrow(d, 0, 1), 1
                    if self.read is _read_elements:
                        place[1] = place[1].narrow(d, 0, 1)
        placed = self.put(of.new_full(shape, NOBODY), of, *place)
        if self.read is None:
            return placed, of, of
        if self.read is _read_elements:
            of = of[tuple(slice(0, s) for s in place[1].shape)]
        return placed, of, self.read(placed, *place)


WRITES: dict[Callable, Write] = {
    f: write
    for names, write in (
        ("index_add index_add_", Write(["input", "dim", "index", "source"], _put_rows, _read_rows, adds=True)),
        ("index_copy index_copy_", Write(["input", "dim", "index", "source"], _put_rows, _read_rows)),
        ("scatter_add scatter_add_", Write(["input", "dim", "index", "src"], _put_elements, _read_elements, adds=True)),
        ("scatter scatter_", Write(["input", "dim", "index", "src"], _put_elements, _read_elements)),
        ("index_put index_put_", Write(["input", "indices", "values"], _put_at, _read_at)),
        ("masked_scatter masked_scatter_", Write(["input", "mask", "source"], _put_masked, None)),
        ("__setitem__", Write(["input", "indices", "values"], _put_at, _read_at)),
    )
    for name in names.split()
    for f in functions(name)
}
