"""Forms of the products that suit a CPU: blocks that stay in cache, through the fastest product that PyTorch ships.

The weight gradient with all samples' scores comes from blocks of per-sample gradients: a block is one batched product, read
twice while the cache still holds it, once for its sum, once against ``P``; of a large weight it is one sample's gradient. Only
where samples are so short that writing their gradients costs more than a second product does the contraction
``(a @ P.T * b)`` serve instead.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**19  # elements of the product held at once: 2 MB of float32
_SMALL = 2**20  # multiplications below which calling oneDNN takes longer than it saves
# multiplications below which a product is not worth casting for
LARGE = 2**26
BLOCK_BYTES = 4 << 20  # of per-sample gradients held at once: larger blocks leave the cache and measured slower
# elements of a weight from which on samples go one by one: one gradient is added up and multiplied at the memory's speed, which the
# rows of a block are not (5 to 7% of a GPT's whole step, 6 layers of width 384)
ALONE = 2**16
SHORT = 16  # tokens per sample up to which the contraction measured faster


def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ weight.T + bias``: by oneDNN, which on CPUs that are not Intel's runs up to twice as fast as the default BLAS."""
    if torch.compiler.is_compiling() or a.numel() * weight.shape[0] < _SMALL:
        return F.linear(a, weight, bias)
    if a.device.type != "cpu" or not a.dtype == weight.dtype == torch.float32:
        return F.linear(a, weight, bias)
    # the direct call knows no autograd
    differentiable = torch.is_grad_enabled() and (a.requires_grad or weight.requires_grad)
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if differentiable or not has or a.numel() == 0:
        return F.linear(a, weight, bias)
    rows = torch.ops.mkldnn._linear_pointwise(a.reshape(-1, a.shape[-1]), weight, bias, "none", [], "")
    return rows.view(*a.shape[:-1], len(weight))


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 with sums in float32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def contract(a: Tensor, b: Tensor, P: Tensor, P_bias: Tensor | None = None, half: bool = False) -> Tensor:
    """``[n, K]``: ``sum over tokens and outputs of (a @ P.T + P_bias) * b``, the product never in memory as a whole.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, P ``[K, d_out, d_in]``, P_bias ``[K, d_out]``, of one dtype; sums in that dtype, in
    an order that does not depend on the threads. With ``half``, the operands of a large float32 product are rounded to bfloat16.
    """
    n, T, d_out = b.shape
    if b.numel() == 0 or a.numel() == 0:
        return a.new_zeros(n, len(P))
    if half and a.dtype == torch.float32 and a.numel() * d_out >= LARGE:
        a, P, P_bias = a.bfloat16(), P.bfloat16(), None if P_bias is None else P_bias.bfloat16()
    together = max(1, _BLOCK // (T * d_out))  # samples
    rows, flat = a.reshape(n * T, -1), b.reshape(n, -1)
    columns = []
    for k in range(P.shape[0]):
        weight, bias = P[k], None if P_bias is None else P_bias[k]
        if n <= together:
            columns.append(dots(linear(rows, weight, bias), flat))
            continue
        blocks = zip(rows.split(together * T), flat.split(together), strict=True)
        columns.append(torch.cat([dots(linear(x, weight, bias), y) for x, y in blocks]))
    return torch.stack(columns, 1)


def dots(x: Tensor, y: Tensor) -> Tensor:
    """``[n]``: the products of the rows of ``y [n, m]`` with those of ``x``, of any shape with as many elements."""
    x = (x if x.dtype == y.dtype else x.to(y.dtype)).view(y.shape)
    return torch.dot(x[0], y[0]).unsqueeze(0) if y.shape[0] == 1 else torch.linalg.vecdot(x, y)


def wgrad_score(
    a: Tensor,
    b: Tensor,
    P: Tensor,
    *,
    offsets: Tensor | list[int] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Tensor, Tensor]:
    """Weight gradient ``[d_out, d_in]`` and scores ``[n, K]``; definition: ``definition.wgrad_score``.

    Args:
        a, b: the layer's input ``[n, T, d_in]`` and output gradient ``[n, T, d_out]``; or ``[rows, d_in]``, ``[rows, d_out]``
            with ``offsets``.
        P: direction ``[K, d_out, d_in]``.
        offsets: ``[n + 1]`` integers; rows ``offsets[i] : offsets[i + 1]`` are sample ``i``'s.
        block_bytes: bound of the per-sample gradients held at once; one sample's at least.

    Computed in float32 (float64 for float64 inputs), which is the scores' dtype; the gradient has ``a``'s. Deterministic.
    """
    full, bounds = a.dtype, None if offsets is None else torch.as_tensor(offsets).tolist()
    made_in = torch.promote_types(full, torch.float32)
    a, b, P = (x if x.dtype == made_in else x.to(made_in) for x in (a, b, P))
    if bounds is not None:
        n = len(bounds) - 1
        lengths = {end - begin for begin, end in pairwise(bounds)}
        if len(lengths) == 1 and bounds[0] == 0 and bounds[-1] == len(a):  # not ragged after all
            a, b, bounds = a.unflatten(0, (n, *lengths)), b.unflatten(0, (n, *lengths)), None
    else:
        n = a.shape[0]
    if a.numel() <= SHORT * n * a.shape[-1]:
        made, scores = _contracted(a, b, P, bounds)
    else:
        made, scores = _in_blocks(a, b, P, bounds, block_bytes)
    return made if made.dtype == full else made.to(full), scores


def _contracted(a: Tensor, b: Tensor, P: Tensor, bounds: list[int] | None) -> tuple[Tensor, Tensor]:
    if bounds is None:  # the gradient of plain training, to the bit
        return b.reshape(-1, b.shape[-1]).T @ a.reshape(-1, a.shape[-1]), contract(a, b, P)
    per_row = torch.stack([((a @ p.T) * b).sum(-1) for p in P], -1)  # [rows, K]
    lengths = torch.tensor(bounds).diff()
    a, b, per_row = (x[bounds[0] : bounds[-1]] for x in (a, b, per_row))
    samples = torch.arange(len(lengths)).repeat_interleave(lengths)  # [rows]
    return b.T @ a, per_row.new_zeros(len(lengths), len(P)).index_add_(0, samples, per_row)


def _in_blocks(a: Tensor, b: Tensor, P: Tensor, bounds: list[int] | None, block_bytes: int) -> tuple[Tensor, Tensor]:
    d_out, d_in = P.shape[1:]
    n = a.shape[0] if bounds is None else len(bounds) - 1
    total, directions = a.new_zeros(d_out * d_in), P.flatten(1)
    if n and d_out * d_in >= ALONE:
        gradient, found = a.new_empty(d_out, d_in), []
        flat = gradient.view(-1)
        for i in range(n):
            rows: int | slice = i if bounds is None else slice(bounds[i], bounds[i + 1])
            torch.mm(b[rows].T, a[rows], out=gradient)
            total.add_(flat)
            found += [torch.dot(flat, direction) for direction in directions]
        return total.view(d_out, d_in), torch.stack(found).view(n, -1)
    per_block = min(n, max(1, block_bytes // (d_out * d_in * a.element_size()))) if bounds is None else 1
    block = a.new_empty(per_block, d_out, d_in)
    scores, ones = a.new_empty(n, len(P)), a.new_ones(per_block)
    for i in range(0, n, per_block):
        k = min(per_block, n - i)
        rows = slice(i, i + k) if bounds is None else slice(bounds[i], bounds[i + 1])
        x, y = (a[rows], b[rows]) if bounds is None else (a[None, rows], b[None, rows])
        torch.bmm(y.mT, x, out=block[:k])
        blocks = block[:k].view(k, -1)
        total.addmv_(blocks.T, ones[:k])
        torch.mm(blocks, directions.T, out=scores[i : i + k])
    return total.view(d_out, d_in), scores
