"""``sum over tokens of (x_hat * P_weight + P_bias) . b``: the score of LayerNorm or RMSNorm over the last dimension.

The layer's own forward with ``P`` for its parameters, fused with the dot; ``x`` and ``b`` are read once. Counts: README.md, `norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.reduce import per_token as by_token
from adam_ghost.kernels.reduce import sum_samples

LARGEST = 65536  # features of a row that fits one program


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_score(
    x, x_t, x_d, b, b_t, b_d, weight, bias, part, N, d, eps, K,
    BT: tl.constexpr, BD: tl.constexpr, CENTER: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_f = tl.arange(0, BD)
    m = (o_t < N)[:, None] & (o_f < d)[None, :]
    o_d = o_f.to(tl.int64)[None, :]
    b_x = tl.load(x + o_t[:, None] * x_t + o_d * x_d, mask=m, other=0.0).to(tl.float32)
    b_b = tl.load(b + o_t[:, None] * b_t + o_d * b_d, mask=m, other=0.0).to(tl.float32)
    if CENTER:
        b_x = tl.where(m, b_x - tl.sum(b_x, 1)[:, None] / d, 0.0)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / d + eps)[:, None]
    for k in tl.range(0, K):
        p_k = tl.cast(k, tl.int64) * d + o_f
        b_y = b_x * tl.load(weight + p_k, mask=o_f < d, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            b_y += tl.load(bias + p_k, mask=o_f < d, other=0.0).to(tl.float32)[None, :]
        tl.store(part + tl.cast(k, tl.int64) * N + o_t, tl.sum(b_y * b_b, 1), mask=o_t < N)


def norm_score(
    x: Tensor, b: Tensor, P_weight: Tensor, P_bias: Tensor | None, eps: float, kind: str, offsets: Tensor | None = None,
    per_token: bool = False,
) -> Tensor:  # fmt: skip
    """``[n, K]``, or per token ``[n, T, K]`` / ``[N, K]``, float32.

    x and b ``[n, T, d]``, or ``[N, d]`` with ``offsets [n + 1]``; P_weight and P_bias ``[K, d]``; kind ``layer`` or ``rms``.
    """
    tokens, n = x.shape[:-1], x.shape[0] if offsets is None else len(offsets) - 1
    x, b = (y.reshape(-1, y.shape[-1]) for y in (x, b))
    (N, d), K = x.shape, len(P_weight)
    if N * d * K == 0:
        return torch.zeros(*(tokens if per_token else (n,)), K, device=x.device)
    part = torch.empty(K, 1, N, device=x.device)
    BD = triton.next_power_of_2(d)
    BT = max(1, 2048 // BD)
    P_weight, P_bias = P_weight.contiguous(), None if P_bias is None else P_bias.contiguous()
    _norm_score[(triton.cdiv(N, BT),)](
        x, *x.stride(), b, *b.stride(), P_weight, P_bias, part, N, d, eps, K, BT, BD, kind == "layer", P_bias is not None,
        num_warps=min(32, max(4, BD // 1024)),
    )  # fmt: skip
    return by_token(part, tokens) if per_token else sum_samples(part, n, offsets)
