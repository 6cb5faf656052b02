"""Forms of the products that suit a CPU: blocks that stay in cache, through the fastest product that PyTorch ships."""

import torch
from torch import Tensor

_BLOCK = 2**19  # elements of the product held at once: 2 MB of float32


def _onednn_linear(a: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")


def _product(a: Tensor):
    """``a @ weight.T`` by oneDNN, which on CPUs that are not Intel's runs up to twice as fast as the default BLAS."""
    has = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return _onednn_linear if has and a.dtype == torch.float32 else torch.nn.functional.linear


def contract(a: Tensor, b: Tensor, P: Tensor) -> Tensor:
    """``[n, K]``: ``sum over tokens and outputs of (a @ P.T) * b``, the product never in memory as a whole.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, P ``[K, d_out, d_in]``, of one dtype; sums in that dtype, in an order that does
    not depend on the threads.
    """
    n, T, d_out = b.shape
    product = _product(a)
    scores = a.new_zeros(n, len(P))
    if T == 0:
        return scores
    a, b = a.contiguous(), b.contiguous()
    together = max(1, _BLOCK // (T * d_out))
    for k, weight in enumerate(P.contiguous()):
        for i in range(0, n, together):
            block = b[i : i + together].flatten(1)
            y = product(a[i : i + together].flatten(0, 1), weight).view(block.shape)
            if together == 1:
                scores[i, k] = torch.dot(y[0], block[0])
            else:
                scores[i : i + together, k] = torch.linalg.vecdot(y, block)
    return scores
