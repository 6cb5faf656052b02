"""From per-token parts to per-sample scores, summed in a fixed order, so that equal inputs give equal bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.tiles import token_range


@triton.jit(do_not_specialize=["N", "T", "parts"])
def _sum_samples(part, offsets, scores, N, T, parts, K, BT: tl.constexpr, RAGGED: tl.constexpr):
    sample, k = tl.program_id(0), tl.program_id(1)
    start, stop = token_range(offsets, sample, T, RAGGED)
    if not RAGGED:
        start += sample * T
        stop = start + T
    o_t = tl.arange(0, BT)
    acc = tl.zeros((BT,), tl.float32)
    for j in tl.range(0, parts):
        p_part = part + (tl.cast(k, tl.int64) * parts + j) * N
        for t in tl.range(start, stop, BT):
            acc += tl.load(p_part + t + o_t, mask=t + o_t < stop, other=0.0)
    tl.store(scores + tl.cast(sample, tl.int64) * K + k, tl.sum(acc))


def sum_samples(part: Tensor, n: int, offsets: Tensor | None) -> Tensor:
    """``part [K, parts, N]`` float32, N tokens sample after sample -> ``[n, K]``."""
    K, parts, N = part.shape
    scores = torch.empty(n, K, device=part.device)
    if n and K:
        T = N // n
        _sum_samples[(n, K)](part, offsets, scores, N, T, parts, K, 1024, offsets is not None, num_warps=4)
    return scores


def per_token(part: Tensor, shape: torch.Size) -> Tensor:
    """``part [K, parts, N]`` -> ``[*shape, K]`` with ``N`` tokens laid out as ``shape``."""
    return part.sum(1).mT.contiguous().view(*shape, part.shape[0])
