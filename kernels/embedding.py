"""``sum over tokens of P[k, indices[t]] . b[t]``: an embedding's score, gathered rows of ``P`` never written to memory.

Bound by memory: one row of ``b`` and one of each ``P`` per token. Counts: README.md, `embedding`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.reduce import per_token as by_token
from adam_ghost.kernels.reduce import sum_samples


@triton.jit(do_not_specialize=["N", "PADDING"])
def _embedding_score(
    indices, b, b_t, b_d, p, part, N, rows, d, PADDING, K, BT: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    b_row = tl.load(indices + o_t, mask=o_t < N, other=PADDING)
    m_t = (o_t < N) & (b_row != PADDING)
    for k in tl.range(0, K):
        acc = tl.zeros((BT, BD), tl.float32)
        for f in tl.range(0, d, BD):
            o_f = f + tl.arange(0, BD)
            m = m_t[:, None] & (o_f < d)[None, :]
            b_b = tl.load(b + o_t[:, None] * b_t + o_f.to(tl.int64)[None, :] * b_d, mask=m, other=0.0)
            b_p = tl.load(p + (tl.cast(k, tl.int64) * rows + b_row)[:, None] * d + o_f[None, :], mask=m, other=0.0)
            acc += b_b.to(tl.float32) * b_p.to(tl.float32)
        tl.store(part + tl.cast(k, tl.int64) * N + o_t, tl.sum(acc, 1), mask=o_t < N)


def embedding_score(
    indices: Tensor, b: Tensor, P: Tensor, padding_idx: int | None = None, offsets: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """``[n, K]``, or per token ``[n, T, K]`` / ``[N, K]``, float32.

    indices ``[n, T]`` and b ``[n, T, d]``, or ``[N]`` and ``[N, d]`` with ``offsets [n + 1]``; P ``[K, rows, d]``.
    """
    tokens, n = indices.shape, indices.shape[0] if offsets is None else len(offsets) - 1
    b, flat, P = b.reshape(-1, b.shape[-1]), indices.reshape(-1).contiguous(), P.contiguous()
    K, rows, d = P.shape
    N = flat.shape[0]
    if N == 0 or P.numel() == 0:
        return torch.zeros(*(tokens if per_token else (n,)), K, device=b.device)
    part = torch.empty(K, 1, N, device=b.device)
    BT, BD = 8, min(512, max(16, triton.next_power_of_2(d)))
    # a negative index is never valid, so it can stand for no padding
    padding = -1 if padding_idx is None else padding_idx % rows
    _embedding_score[(triton.cdiv(N, BT),)](flat, b, *b.stride(), P, part, N, rows, d, padding, K, BT, BD, num_warps=4)
    return by_token(part, tokens) if per_token else sum_samples(part, n, offsets)
