"""Follows the batch through a forward pass: which dimension of which tensor counts the samples.

A module call is attributed sample by sample along that dimension. Sizes alone cannot tell it: a position embedding called
on ``arange(T)`` looks like a batch when ``T == n``. So tags follow the data, from the model's inputs through every torch
function that Python calls. What no rule knows, and what mixes samples (a mean over the batch, a flip of it, a product of
samples with samples), loses its tag and is marked as lost: it is never guessed at again.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
            name = _PROPERTIES.get(func, "detach")
        if not args and "input" in kwargs:
            args = (kwargs["input"],)
        kwargs = {k: x for k, x in kwargs.items() if k not in ("input", "out")}
        try:
            tag = self._infer(name, args, kwargs, tensors, out)
        except (TypeError, ValueError, IndexError, RuntimeError):  # called in a way that no rule foresees
            return None
        return tag if tag is not None and tag[0] >= 0 and self.fits(out, tag) else None

    def _infer(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor) -> Tag | None:
        if name in _MIXING:
            return None
        if name in _PRODUCTS:
            rule, tagged = _PRODUCTS[name], self._tagged(tensors)
            tags = {
                (rule(i, self[t][0], out, *args, **kwargs), self[t][1])
                for i, t in enumerate(tensors)
                if any(t is x for x in tagged)
            }
            return tags.pop() if len(tags) == 1 and None not in next(iter(tags)) else None
        if name == "__setitem__":
            return self._written(*args)
        x = args[0] if args else None
        if not (name in _RULES or name in _RESHAPES) or (name in ("max", "min") and len(tensors) == 2):
            return self._aligned(tensors, out)
        if isinstance(x, (list, tuple)):
            x = next(t for t in tensors if self[t])
            if any(self[t] not in (None, self[x]) for t in tensors):
                return None
        if self[x] is None:
            table = name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype not in (torch.bool, torch.uint8)
            return self[args[1]] if table else None  # rows of a table, one per element of the index
        axis, rows = self[x]
        if name in _RESHAPES:
            return self._reshaped(x, axis, out)
        axis = _RULES[name](x, axis, out, *args[1:], **kwargs)
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
        found = [a for a in places if target.shape[a] == self.n * rows and _getitem(target, a, target, index) == axis]
        return (found[0], rows) if len(found) == 1 else None


# Rules: where dimension ``axis`` of ``x`` lands in the result, given its arguments after ``x``; None if nowhere


def _permute(x, axis, out, *dims, **kwargs):
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return [d % x.ndim for d in dims].index(axis)


def _swap(x, axis, out, *dims, **kwargs):
    a, b = (d % x.ndim for d in (*dims, *kwargs.values()))
    return {a: b, b: a}.get(axis, axis)


def _move(x, axis, out, source, destination):
    return torch.empty([7 if d == axis else 1 for d in range(x.ndim)], device="meta").movedim(source, destination).shape.index(7)


def _getitem(x, axis, out, index):
    """Where the batch dimension lands, None if it is indexed by anything but a full slice."""
    index = list(index) if isinstance(index, tuple) else [index]
    used = sum(i is not None and i is not Ellipsis for i in index)
    at = next((k for k, i in enumerate(index) if i is Ellipsis), len(index))
    index[at : at + 1] = [slice(None)] * (x.ndim - used)
    advanced = [k for k, i in enumerate(index) if not isinstance(i, slice) and i is not None]
    if any(isinstance(index[k], (Tensor, list)) for k in advanced) and advanced[-1] - advanced[0] >= len(advanced):
        return None  # the looked-up dimensions come first
    dim = place = 0
    for i in index:
        if dim == axis and i is not None:
            return place if isinstance(i, slice) and i.indices(x.shape[axis]) == (0, x.shape[axis], 1) else None
        if isinstance(i, (Tensor, list)):
            return None  # before the batch: may take any number of dimensions
        dim += i is not None
        place += not isinstance(i, int)
    return None


def _select(x, axis, out, dim=0, *_, **__):
    dim %= x.ndim
    return None if dim == axis else axis - (dim < axis)


def _squeeze(x, axis, out, dim=None):
    dims = range(x.ndim) if dim is None else ([dim] if isinstance(dim, int) else dim)
    gone = {d % x.ndim for d in dims if x.shape[d] == 1}
    return None if axis in gone else axis - sum(d < axis for d in gone)


def _unsqueeze(x, axis, out, dim):
    return axis + (dim % (x.ndim + 1) <= axis)


def _flip(x, axis, out, *dims, **kwargs):
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return None if axis in {d % x.ndim for d in dims} else axis


def _batch_norm(x, axis, out, mean=None, var=None, weight=None, bias=None, training=False, *_, **__):
    return None if training or mean is None else axis


def _convolution(x, axis, out, weight, *_, **__):
    return axis if axis == 0 and x.ndim == weight.ndim else None


def _cdist(x, axis, out, *_, **__):
    return axis if axis < x.ndim - 2 else None


def _kept(x, axis, out, *_, **__):
    return axis


def _stack(x, axis, out, dim=0, **_):
    return axis + (dim % (x.ndim + 1) <= axis)


def _transposed_last(x, axis, out):
    return _swap(x, axis, out, -1, -2) if x.ndim > 1 else axis


def _repeated(x, axis, out, *_, **__):
    return axis + out.ndim - x.ndim


def _dims(position, default, args, kwargs):
    """The ``dim`` argument, by name or at its ``position`` after ``x``; None if it is absent or something else."""
    dim = next((kwargs[k] for k in ("dim", "dims", "axis") if k in kwargs), args[position] if len(args) > position else default)
    if isinstance(dim, (tuple, list)):
        return tuple(dim)
    return (dim,) if type(dim) is int else None


def _reduces(position=0, default=None):
    """The rule of a function that sums up the dimensions that it is given."""

    def rule(x, axis, out, *args, **kwargs):
        dims = _dims(position, default, args, kwargs)
        if dims is None or axis in (gone := {d % x.ndim for d in dims}):
            return None
        return axis if out.ndim == x.ndim else axis - sum(d < axis for d in gone)

    return rule


def _mixes(position=0, default=None):
    """The rule of a function that mixes what lies along the dimensions that it is given."""

    def rule(x, axis, out, *args, **kwargs):
        dims = _dims(position, default, args, kwargs)
        return None if dims is None or out.ndim != x.ndim or axis in {d % x.ndim for d in dims} else axis

    return rule


_T = torch.Tensor
_PROPERTIES = {_T.T.__get__: "t", _T.H.__get__: "t", _T.mT.__get__: "mT", _T.mH.__get__: "mT"}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"}
_MIXING = {"renorm", "cov", "corrcoef", "pdist", "outer", "ger", "kron", "cartesian_prod", "combinations", "block_diag"}
_MIXING |= {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_", "resize_"}  # the shape before is gone
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
    "flip": _flip,
    "batch_norm": _batch_norm,
    "cdist": _cdist,
    "embedding": _kept,
    "embedding_bag": _kept,
    "norm": _reduces(1),
    "linalg_norm": _reduces(1),
    "linalg_vector_norm": _reduces(1),
    "quantile": _reduces(1),
    "kthvalue": _reduces(1, -1),
    "cosine_similarity": _reduces(1, 1),
    "sort": _mixes(0, -1),
    "argsort": _mixes(0, -1),
    "glu": _mixes(0, -1),
    "roll": _mixes(1),
    "topk": _mixes(1, -1),
    "normalize": _mixes(1, 1),
    "take_along_dim": _mixes(1),
    "repeat_interleave": _mixes(1),
    "diff": _mixes(1, -1),
    "fft_fft": _mixes(1, -1),
    "fft_ifft": _mixes(1, -1),
    "fft_rfft": _mixes(1, -1),
    "fft_irfft": _mixes(1, -1),
    "fft_fft2": _mixes(1, (-2, -1)),
    "fft_fftn": _mixes(1),
}
_RULES |= {f"conv{kind}{d}d": _convolution for kind in ("", "_transpose") for d in (1, 2, 3)}
_RULES |= dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _repeated)
_RULES |= dict.fromkeys(
    (
        *("sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "max", "min", "aminmax", "median", "nanmedian", "mode"),
        *("var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin", "any", "all", "count_nonzero"),
    ),
    _reduces(),
)
_RULES |= dict.fromkeys(
    (
        *("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "softmax", "log_softmax", "softmin", "gather", "narrow"),
        *("index_select", "index_add", "index_copy", "index_fill", "scatter", "scatter_add", "scatter_reduce"),
        *("cumsum_", "index_add_", "index_copy_", "scatter_", "scatter_add_"),
    ),
    _mixes(),
)


# Rules of products: where dimension ``axis`` of the ``i``-th tensor argument lands, given all arguments


def _matmul(i, axis, out, x, other, **_):
    operand, other = (x, other) if i == 0 else (other, x)
    summed = operand.ndim - 1 if i == 0 or operand.ndim == 1 else operand.ndim - 2
    if axis == summed:
        return None
    if other.ndim == 1:
        return axis - (axis > summed)
    return axis + out.ndim - operand.ndim + (operand.ndim == 1)


def _rmatmul(i, axis, out, x, other, **_):
    return _matmul(1 - i, axis, out, other, x)


def _addmm(i, axis, out, bias, x, y, **_):
    return axis + out.ndim - bias.ndim if i == 0 else _matmul(i - 1, axis, out, x, y)


def _linear(i, axis, out, x, weight, bias=None):
    return axis if i == 0 and axis < x.ndim - 1 else None


def _attention(i, axis, out, *args, **kwargs):
    operand = (*args, *kwargs.values())[i]
    return axis + out.ndim - operand.ndim if axis < operand.ndim - 2 else None


def _einsum(i, axis, out, equation, *operands, **_):
    operands = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    terms, result = equation.replace(" ", "").split("->")

    def letters(term, ndim):
        unnamed = ndim - len(term.replace("...", ""))
        return term.replace("...", "".join(chr(945 + k) for k in reversed(range(unnamed))))  # aligned from the right

    letter = letters(terms.split(",")[i], operands[i].ndim)[axis]
    return letters(result, out.ndim).index(letter) if letter in result else None


def _tensordot(i, axis, out, x, y, dims=2, **_):
    left, right = (range(x.ndim - dims, x.ndim), range(dims)) if isinstance(dims, int) else dims
    gone = {d % (x, y)[i].ndim for d in (left, right)[i]}
    if axis in gone:
        return None
    return axis - sum(d < axis for d in gone) + (i and x.ndim - len(list(left)))


_PRODUCTS = {name: _matmul for name in ("matmul", "__matmul__", "mm", "bmm", "mv")} | {
    "__rmatmul__": _rmatmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmm,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "tensordot": _tensordot,
}
