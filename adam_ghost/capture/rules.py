"""Where a torch function takes the batch: a table of rules."""

import torch
from torch import Tensor

# Rules: where dimension ``axis`` of ``x`` lands in the result, given its arguments after ``x``; None if nowhere


def _permute(x, axis, out, *dims, **kwargs):
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return [d % x.ndim for d in dims].index(axis)


def _swap(x, axis, out, *dims, **kwargs):
    a, b = (d % x.ndim for d in (*dims, *kwargs.values()))
    return {a: b, b: a}.get(axis, axis)


def _move(x, axis, out, source, destination):
    return torch.empty([7 if d == axis else 1 for d in range(x.ndim)], device="meta").movedim(source, destination).shape.index(7)


def getitem(x, axis, out, index):
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
PROPERTIES = {_T.T.__get__: "t", _T.H.__get__: "t", _T.mT.__get__: "mT", _T.mH.__get__: "mT"}
RESHAPES = {"reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel"}
MIXING = {"renorm", "cov", "corrcoef", "pdist", "outer", "ger", "kron", "cartesian_prod", "combinations", "block_diag"}
MIXING |= {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_", "resize_"}  # the shape before is gone
RULES = {
    "permute": _permute,
    "transpose": _swap,
    "swapaxes": _swap,
    "swapdims": _swap,
    "movedim": _move,
    "moveaxis": _move,
    "t": _transposed_last,
    "mT": _transposed_last,
    "__getitem__": getitem,
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
RULES |= {f"conv{kind}{d}d": _convolution for kind in ("", "_transpose") for d in (1, 2, 3)}
RULES |= dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _repeated)
RULES |= dict.fromkeys(
    (
        *("sum", "nansum", "mean", "nanmean", "prod", "amax", "amin", "max", "min", "aminmax", "median", "nanmedian", "mode"),
        *("var", "std", "var_mean", "std_mean", "logsumexp", "argmax", "argmin", "any", "all", "count_nonzero"),
    ),
    _reduces(),
)
RULES |= dict.fromkeys(
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


PRODUCTS = {name: _matmul for name in ("matmul", "__matmul__", "mm", "bmm", "mv")} | {
    "__rmatmul__": _rmatmul,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "addmv": _addmm,
    "linear": _linear,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
    "tensordot": _tensordot,
}
