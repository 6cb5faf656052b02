"""Forms of the products that suit a CPU: blocks that stay in cache, through the fastest product that PyTorch ships."""

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2**19  # elements of the product held at once: 2 MB of float32
# multiplications below which a product is not worth casting for
_LARGE = 2**26


def linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ weight.T + bias``: by oneDNN, which on CPUs that are not Intel's runs up to twice as fast as the default BLAS."""
    if torch.compiler.is_compiling() or a.device.type != "cpu" or not a.dtype == weight.dtype == torch.float32:
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


def contract(a: Tensor, b: Tensor, P: Tensor, half: bool = False) -> Tensor:
    """``[n, K]``: ``sum over tokens and outputs of (a @ P.T) * b``, the product never in memory as a whole.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, P ``[K, d_out, d_in]``, of one dtype; sums in that dtype, in an order that does
    not depend on the threads. With ``half``, the operands of a large float32 product are rounded to bfloat16.
    """
    n, T, d_out = b.shape
    scores = a.new_zeros(n, len(P))
    if T == 0:
        return scores
    half = half and a.dtype == torch.float32 and a.numel() * d_out >= _LARGE
    a, b, P = a.contiguous(), b.contiguous(), (P.bfloat16() if half else P).contiguous()
    together = max(1, _BLOCK // (T * d_out))
    for k, weight in enumerate(P):
        for i in range(0, n, together):
            block = b[i : i + together].flatten(1)
            y = linear(a[i : i + together].flatten(0, 1).to(weight.dtype), weight).to(b.dtype).view(block.shape)
            if together == 1:
                scores[i, k] = torch.dot(y[0], block[0])
            else:
                scores[i : i + together, k] = torch.linalg.vecdot(y, block)
    return scores
