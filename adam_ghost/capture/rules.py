"""Where a torch function takes the batch: rules for those that are not elementwise.

A rule says where dimension ``axis`` of one argument lands in ``out``; None if what lies along it is mixed, or cannot be told.
A function without a rule loses the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.capture.names import functions


def bind(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with those of ``names`` in their places, however they were passed."""
    args, kwargs = list(args), dict(kwargs)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    return args, kwargs


# Rules of functions whose samples are in their first argument ``x``


def _permute(x, axis, out, *dims, **kwargs):
    dims = kwargs.get("dims", dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)
    return [d % x.ndim for d in dims].index(axis)


def _swap(x, axis, out, *dims, **kwargs):
    a, b = (d % x.ndim for d in (*dims, *kwargs.values()))
    return {a: b, b: a}.get(axis, axis)


def _swapped_last(x, axis, out):
    return _swap(x, axis, out, -1, -2) if x.ndim > 1 else axis


def _reversed(x, axis, out):
    return x.ndim - 1 - axis


def _move(x, axis, out, source, destination):
    return torch.empty([7 if d == axis else 1 for d in range(x.ndim)], device="meta").movedim(source, destination).shape.index(7)


def getitem(x, axis, out, index):
    """Where the batch dimension lands, None if it is indexed by anything but a full slice."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(i, bool) or not isinstance(i, (int, slice, list, Tensor, type(None), type(Ellipsis))) for i in index):
        return None
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


def _rot90(x, axis, out, k=1, dims=(0, 1)):
    return _flip(x, axis, out, dims)


def _kept(x, axis, out, *_, **__):
    return axis if out.ndim >= x.ndim else None


def _repeated(x, axis, out, *_, **__):
    return axis + out.ndim - x.ndim


def _before_last(count):
    """The rule of a function that works on the ``count`` last dimensions, or puts others in their place."""

    def rule(x, axis, out, *_, **__):
        return axis if axis < x.ndim - count else None

    return rule


def _first_dims(count):
    """The rule of a function that works on all dimensions but the ``count`` first: samples, or samples and channels."""

    def rule(x, axis, out, *_, **__):
        return axis if axis < count < x.ndim else None

    return rule


def _unpooled_rows(ndim):
    """The rule of ``fold`` and ``unfold``, whose samples are the first of ``ndim`` dimensions; with one less there are none."""

    def rule(x, axis, out, *_, **__):
        return 0 if axis == 0 and x.ndim == ndim else None

    return rule


def _normalized(x, axis, out, normalized_shape, *_, **__):
    return axis if axis < x.ndim - len(normalized_shape) else None


def _batch_norm(x, axis, out, running_mean=None, running_var=None, weight=None, bias=None, training=False, *_, **__):
    return None if training or running_mean is None else axis


def _without_channels(x, axis, out, *_, **__):
    return None if axis == 1 else axis


def _pad(x, axis, out, pad, *_, **__):
    behind = 2 * (x.ndim - 1 - axis)  # the amounts come in pairs, from the last dimension on
    return None if any(pad[behind : behind + 2]) else axis


def _diagonal(x, axis, out, offset=0, dim1=0, dim2=1):
    gone = {dim1 % x.ndim, dim2 % x.ndim}
    return None if axis in gone else axis - sum(d < axis for d in gone)


def _linalg_diagonal(x, axis, out, *, offset=0, dim1=-2, dim2=-1):
    return _diagonal(x, axis, out, offset, dim1, dim2)


def _embedded_diagonal(x, axis, out, offset=0, dim1=-2, dim2=-1):
    new = {dim1 % out.ndim, dim2 % out.ndim}
    return None if axis == x.ndim - 1 else [d for d in range(out.ndim) if d not in new][axis]


def _unfold(x, axis, out, dimension, size, step):
    return None if dimension % x.ndim == axis else axis


def _vsplit(x, axis, out, *_, **__):
    return _along(0, axis)


def _hsplit(x, axis, out, *_, **__):
    return _along(0 if x.ndim == 1 else 1, axis)


def _dsplit(x, axis, out, *_, **__):
    return _along(2, axis)


def _along(dim, axis):
    return None if dim == axis else axis


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


def _quantile(x, axis, out, q, *args, **kwargs):
    if isinstance(q, Tensor) and q.ndim:  # several of them come first
        return None
    return _reduces(1)(x, axis, out, q, *args, **kwargs)


RULES: dict[Callable, Callable] = {
    f: rule
    for names, rule in (
        ("permute", _permute),
        ("transpose swapaxes swapdims", _swap),
        ("t adjoint", _swapped_last),
        ("movedim moveaxis", _move),
        ("__getitem__", getitem),
        ("select unbind", _select),
        ("squeeze", _squeeze),
        ("unsqueeze", _unsqueeze),
        ("flip", _flip),
        ("rot90", _rot90),
        ("expand expand_as broadcast_to repeat tile", _repeated),
        ("view_as_real F.one_hot", _kept),
        ("view_as_complex", _before_last(1)),
        ("F.layer_norm torch.layer_norm F.rms_norm torch.rms_norm", _normalized),
        ("F.batch_norm", _batch_norm),
        ("F.group_norm torch.group_norm F.instance_norm torch.instance_norm", _first_dims(1)),
        ("F.local_response_norm channel_shuffle native_channel_shuffle", _without_channels),
        ("F.pad constant_pad_nd", _pad),
        ("F.interpolate", _first_dims(2)),
        ("pixel_shuffle pixel_unshuffle", _before_last(3)),
        ("F.unfold", _unpooled_rows(4)),
        ("F.fold", _unpooled_rows(3)),
        ("F.affine_grid", _unpooled_rows(3)),
        ("Tensor.unfold", _unfold),
        ("torch.diagonal Tensor.diagonal", _diagonal),
        ("linalg.diagonal", _linalg_diagonal),
        ("diag_embed", _embedded_diagonal),
        ("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unsafe_split_with_sizes", _mixes(1, 0)),
        ("hsplit fliplr", _hsplit),
        ("vsplit flipud msort", _vsplit),
        ("dsplit", _dsplit),
        ("sum nansum mean nanmean prod amax amin max min aminmax median nanmedian mode var std var_mean std_mean", _reduces()),
        ("logsumexp special.logsumexp argmax argmin any all count_nonzero", _reduces()),
        ("norm linalg.norm linalg.vector_norm", _reduces(1)),
        ("linalg.matrix_norm", _reduces(1, (-2, -1))),
        ("quantile nanquantile", _quantile),
        ("kthvalue", _reduces(1, -1)),
        ("cumsum cumprod cummax cummin logcumsumexp narrow index_fill", _mixes()),
        ("softmax log_softmax softmin special.softmax special.log_softmax", _mixes()),
        ("cumsum_ cumprod_ index_fill_", _mixes()),
        ("sort argsort glu", _mixes(0, -1)),
        ("F.gumbel_softmax", _mixes(3, -1)),
        ("F.normalize", _mixes(1, 1)),
        ("topk diff", _mixes(1, -1)),
        ("roll repeat_interleave", _mixes(1)),
        ("fft.fft fft.ifft fft.rfft fft.irfft fft.hfft fft.ihfft", _mixes(1, -1)),
        ("fft.fft2 fft.ifft2 fft.rfft2 fft.irfft2 fft.hfft2 fft.ihfft2", _mixes(1, (-2, -1))),
        ("fft.fftn fft.ifftn fft.rfftn fft.irfftn fft.hfftn fft.ihfftn", _mixes(1)),
        ("fft.fftshift fft.ifftshift", _mixes()),
        ("avg_pool1d lp_pool1d adaptive_avg_pool1d", _before_last(1)),
        ("max_pool1d max_pool1d_with_indices adaptive_max_pool1d adaptive_max_pool1d_with_indices", _before_last(1)),
        ("avg_pool2d lp_pool2d adaptive_avg_pool2d fractional_max_pool2d fractional_max_pool2d_with_indices", _before_last(2)),
        ("max_pool2d max_pool2d_with_indices adaptive_max_pool2d adaptive_max_pool2d_with_indices", _before_last(2)),
        ("avg_pool3d lp_pool3d adaptive_avg_pool3d fractional_max_pool3d fractional_max_pool3d_with_indices", _before_last(3)),
        ("max_pool3d max_pool3d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices", _before_last(3)),
        ("cholesky inverse pinverse det logdet slogdet matrix_exp matrix_power qr svd", _before_last(2)),
        ("linalg.cholesky linalg.cholesky_ex linalg.inv linalg.inv_ex linalg.det linalg.slogdet", _before_last(2)),
        ("linalg.matrix_exp linalg.matrix_power linalg.cond linalg.qr linalg.lu", _before_last(2)),
        ("linalg.svd linalg.svdvals linalg.eig linalg.eigvals linalg.eigh linalg.eigvalsh linalg.polar", _before_last(2)),
    )
    for name in names.split()
    for f in functions(name)
}
RULES |= {getattr(Tensor, name).__get__: _reversed for name in ("T", "H")}
RULES |= {getattr(Tensor, name).__get__: _swapped_last for name in ("mT", "mH")}
RESHAPES = frozenset(
    f for name in ("reshape", "view", "flatten", "unflatten", "view_as", "reshape_as", "ravel") for f in functions(name)
)


# Rules of lists: where dimension ``axis`` of any of their tensors lands


def _cat(tensors, axis, out, dim=0, **_):
    return _along(dim % out.ndim, axis)


def _stack(tensors, axis, out, dim=0, **_):
    return axis + (dim % out.ndim <= axis)


def _hstack(tensors, axis, out, **_):
    return _along(0 if tensors[0].ndim == 1 else 1, axis)


def _vstack(tensors, axis, out, **_):
    return 1 if tensors[0].ndim == 1 else _along(0, axis)


def _dstack(tensors, axis, out, **_):
    return _along(2, axis) if tensors[0].ndim > 2 else None


def _column_stack(tensors, axis, out, **_):
    return _along(1, axis)


LISTS: dict[Callable, Callable] = {
    f: rule
    for names, rule in (
        ("cat concat concatenate", _cat),
        ("stack", _stack),
        ("hstack", _hstack),
        ("vstack row_stack", _vstack),
        ("dstack", _dstack),
        ("column_stack", _column_stack),
    )
    for name in names.split()
    for f in functions(name)
}


# Rules of functions of several tensors: where dimension ``axis`` of the ``i``-th argument lands, given all arguments


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


def _grouped(i, axis, out, x, weight, *_, **__):
    """Rows sorted by group: of either a dimension of their own, or told by offsets."""
    return (axis if axis < x.ndim - 1 else None) if i == 0 and weight.ndim == 3 else None


def _addmm(i, axis, out, bias, x, y, **_):
    return axis + out.ndim - bias.ndim if i == 0 else _matmul(i - 1, axis, out, x, y)


def _inner(i, axis, out, x, y, **_):
    if axis == (x, y)[i].ndim - 1:
        return None
    return axis + (x.ndim - 1 if i else 0)


def _linear(i, axis, out, x, weight, bias=None):
    return axis if i == 0 and axis < x.ndim - 1 else None


def _bilinear(i, axis, out, x, y, weight, bias=None):
    return axis if i < 2 and axis < x.ndim - 1 else None


def _convolution(i, axis, out, x, weight, *_, **__):
    return axis if i == 0 and axis == 0 and x.ndim == weight.ndim else None


def _prelu(i, axis, out, x, weight):
    return axis if i == 0 else None


def _embedding(i, axis, out, x, weight, *_, **__):
    return axis if i == 0 else None


def _embedding_bag(i, axis, out, x, weight, *_, **__):
    return 0 if i == 0 and axis == 0 and x.ndim == 2 else None


def _attention(i, axis, out, *operands, **_):
    operand = operands[i]
    return axis + out.ndim - operand.ndim if axis < operand.ndim - 2 else None


def einsum(equation: str, operands: Sequence[Tensor], i: int, axis: int, out: Tensor) -> int | None:
    left, _, result = equation.replace(" ", "").partition("->")
    if "->" not in equation:
        once = sorted(x for x in set(left) - {",", "."} if left.count(x) == 1)
        result = "..." * ("..." in left) + "".join(once)

    def letters(term: str, ndim: int) -> str:
        unnamed = ndim - len(term.replace("...", ""))
        return term.replace("...", "".join(chr(945 + k) for k in reversed(range(unnamed))))  # aligned from the right

    letter = letters(left.split(",")[i], operands[i].ndim)[axis]
    place = letters(result, out.ndim).find(letter)
    return None if place < 0 else place


def _tensordot(i, axis, out, x, y, dims=2, **_):
    left, right = (range(x.ndim - dims, x.ndim), range(dims)) if isinstance(dims, int) else dims
    gone = {d % (x, y)[i].ndim for d in (left, right)[i]}
    if axis in gone:
        return None
    return axis - sum(d < axis for d in gone) + (i and x.ndim - len(list(left)))


def _cdist(i, axis, out, x, y, *_, **__):
    if axis >= (x, y)[i].ndim - 2:  # a point of x is a row of the distances, one of y a column
        return out.ndim - 2 + i if axis == (x, y)[i].ndim - 2 else None
    return axis + out.ndim - (x, y)[i].ndim


def _aligned(axis, x, ndim):
    """Where dimension ``axis`` of ``x`` comes to stand when it is broadcast to ``ndim`` dimensions."""
    return axis + ndim - x.ndim


def _cosine_similarity(i, axis, out, x, y, dim=1, *_, **__):
    ndim = out.ndim + 1
    axis, dim = _aligned(axis, (x, y)[i], ndim), dim % ndim
    return None if axis == dim else axis - (dim < axis)


def _pairwise_distance(i, axis, out, x, y, p=2.0, eps=1e-6, keepdim=False):
    ndim = max(x.ndim, y.ndim)
    axis = _aligned(axis, (x, y)[i], ndim)
    return axis if axis < ndim - 1 else None


def _vecdot(i, axis, out, x, y, *, dim=-1, **_):
    return _cosine_similarity(i, axis, out, x, y, dim)


def _cross(i, axis, out, x, y, *, dim=-1, **_):
    axis = _aligned(axis, (x, y)[i], out.ndim)
    return None if axis == dim % out.ndim else axis


def _solve(i, axis, out, A, B, **_):
    return axis if A.ndim == B.ndim and axis < A.ndim - 2 else None


def _solve_triangular(i, axis, out, A, B, **_):
    axis = _aligned(axis, (A, B)[i], out.ndim)
    return axis if axis < out.ndim - 2 else None


def _picked(i, axis, out, x, dim, index, *_, **__):
    """Of functions that pick elements along ``dim``, or put some there, by an index of as many dimensions."""
    return None if not isinstance(dim, int) or dim % x.ndim == axis or out.ndim != x.ndim else axis


def _picked_rows(i, axis, out, x, dim, index, *_, **__):
    """The same with an index of one dimension, which may be the samples'."""
    return dim % x.ndim if i == 2 else _picked(i, axis, out, x, dim, index)


def _taken(i, axis, out, x, indices, dim=None):
    return _picked(i, axis, out, x, dim, indices)


def _class_loss(i, axis, out, x, target, *_, **__):
    """``[n, C, ...]`` against classes ``[n, ...]`` or their probabilities ``[n, C, ...]``, not reduced."""
    if out.ndim != x.ndim - 1 or i > 1:
        return None
    operand = (x, target)[i]
    if axis == 0 or operand.ndim < x.ndim:
        return axis
    return None if axis == 1 else axis - 1


def _row_loss(i, axis, out, *_, **__):
    return 0 if axis == 0 and out.ndim == 1 else None


def _grid_sample(i, axis, out, x, grid, *_, **__):
    return 0 if axis == 0 else None


def _unpool(count):
    def rule(i, axis, out, x, indices, *_, **__):
        return axis if axis < x.ndim - count else None

    return rule


def _cell(i, axis, out, x, *_, **__):
    return 0 if axis == 0 and x.ndim == 2 else None


class Product(NamedTuple):
    """A rule, the names of the function's first arguments, and which of them may carry samples."""

    rule: Callable
    names: Sequence[str]
    carriers: Sequence[int]


def _product(rule, names, carriers=None):
    names = names.split()
    return Product(rule, names, range(len(names)) if carriers is None else carriers)


_PAIR = "input other"
PRODUCTS: dict[Callable, Product] = {
    f: product
    for names, product in (
        ("matmul __matmul__ linalg.matmul", _product(_matmul, _PAIR)),
        ("__rmatmul__", _product(_rmatmul, _PAIR)),
        ("mm bmm", _product(_matmul, "input mat2")),
        ("mv", _product(_matmul, "input vec")),
        ("F.grouped_mm torch._grouped_mm", _product(_grouped, "mat_a mat_b")),
        ("addmm", _product(_addmm, "input mat1 mat2")),
        ("baddbmm", _product(_addmm, "input batch1 batch2")),
        ("addmv", _product(_addmm, "input mat vec")),
        ("inner", _product(_inner, _PAIR)),
        ("F.linear", _product(_linear, "input weight bias")),
        ("F.bilinear torch.bilinear", _product(_bilinear, "input1 input2 weight bias")),
        ("F.scaled_dot_product_attention", _product(_attention, "query key value attn_mask")),
        ("torch.tensordot", _product(_tensordot, "a b", (0, 1))),
        ("torch.cdist", _product(_cdist, "x1 x2")),
        ("F.cosine_similarity", _product(_cosine_similarity, "x1 x2")),
        ("F.pairwise_distance", _product(_pairwise_distance, "x1 x2")),
        ("linalg.vecdot", _product(_vecdot, "x y")),
        ("linalg.cross", _product(_cross, _PAIR)),
        ("linalg.solve", _product(_solve, "A B")),
        ("linalg.solve_triangular", _product(_solve_triangular, "A B")),
        ("prelu", _product(_prelu, "input weight")),
        ("F.embedding", _product(_embedding, "input weight")),
        ("F.embedding_bag", _product(_embedding_bag, "input weight")),
        ("gather", _product(_picked, "input dim index", (0, 2))),
        (
            "scatter scatter_add scatter_reduce scatter_ scatter_add_ scatter_reduce_",
            _product(_picked, "input dim index src", (0, 2, 3)),
        ),
        ("index_add index_copy index_add_ index_copy_", _product(_picked, "input dim index source", (0, 3))),
        ("index_select", _product(_picked_rows, "input dim index", (0, 2))),
        ("take_along_dim", _product(_taken, "input indices dim", (0, 1))),
        ("F.cross_entropy F.nll_loss", _product(_class_loss, "input target")),
        ("F.cosine_embedding_loss", _product(_row_loss, "input1 input2 target")),
        ("F.triplet_margin_loss", _product(_row_loss, "anchor positive negative")),
        ("F.multi_margin_loss F.multilabel_margin_loss F.multilabel_soft_margin_loss", _product(_row_loss, "input target")),
        ("F.grid_sample", _product(_grid_sample, "input grid")),
        ("F.max_unpool1d", _product(_unpool(1), "input indices")),
        ("F.max_unpool2d", _product(_unpool(2), "input indices")),
        ("F.max_unpool3d", _product(_unpool(3), "input indices")),
        ("rnn_tanh_cell rnn_relu_cell gru_cell lstm_cell", _product(_cell, "input hx")),
        *((f"conv{kind}{d}d", _product(_convolution, "input weight bias")) for kind in ("", "_transpose") for d in (1, 2, 3)),
    )
    for name in names.split()
    for f in functions(name)
}

EINSUM = frozenset(functions("torch.einsum"))
