"""Tiles of tokens by features, fetched by tensor descriptor (sm_90 and later) or by pointers, zero outside the data.

Samples are either the first dimension of ``[n, T, d]`` or, ragged, ranges of rows of ``[N, d]`` given by ``offsets``; a kernel
sees both as ``sample * stride_n + token * stride_t + feature * stride_d``, where a ragged operand has ``stride_n = 0`` and
tokens counted over the whole batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def token_range(offsets, sample, T, RAGGED: tl.constexpr):
    """First token of a sample and the one past its last."""
    if RAGGED:
        start = tl.load(offsets + sample).to(tl.int32)
        stop = tl.load(offsets + sample + 1).to(tl.int32)
    else:
        start = sample * 0
        stop = start + T
    return start, stop


@triton.jit
def token_tile(
    x, x_n, x_t, x_d, sample, n, token, stop, feature, d, SAMPLES: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    DESC: tl.constexpr,
):  # fmt: skip
    """``[SAMPLES * TOKENS, FEATURES]``: the rows of samples ``sample ..``, each from its ``token`` on; zero past ``n, stop, d``."""
    if DESC:
        return x.load([sample, token, feature]).reshape(SAMPLES * TOKENS, FEATURES)
    else:
        o_r, o_f = tl.arange(0, SAMPLES * TOKENS), tl.arange(0, FEATURES)
        # int64 before a stride is multiplied, for the tile's corner; within the tile `near` keeps offsets below 2^31
        p_x = x + tl.cast(sample, tl.int64) * x_n + tl.cast(token, tl.int64) * x_t + tl.cast(feature, tl.int64) * x_d
        if SAMPLES == 1:
            m_r = token + o_r < stop
            p_x += (o_r * x_t)[:, None]
        else:
            m_r = (token + o_r % TOKENS < stop) & (sample + o_r // TOKENS < n)
            p_x += ((o_r // TOKENS).to(tl.int64) * x_n + o_r % TOKENS * x_t)[:, None]
        return tl.load(p_x + (o_f * x_d)[None, :], mask=m_r[:, None] & (feature + o_f < d)[None, :], other=0.0)


@triton.jit
def matrix_tile(p, k, row, rows, column, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESC: tl.constexpr):
    """``[ROWS, COLUMNS]`` of matrix ``k`` of the contiguous ``p [K, rows, columns]``, zero outside."""
    if DESC:
        return p.load([k, row, column]).reshape(ROWS, COLUMNS)
    else:
        o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        p_p = p + (tl.cast(k, tl.int64) * rows + row) * columns + column + (o_r[:, None] * columns + o_c[None, :])
        return tl.load(p_p, mask=(row + o_r < rows)[:, None] & (column + o_c < columns)[None, :], other=0.0)


def describable(*tensors: Tensor) -> bool:
    """Whether each can be read through a tensor descriptor: last dimension contiguous, the rest in multiples of 16 bytes."""
    return all(
        x.numel() > 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s * x.element_size() % 16 == 0 and s > 0 for s in x.stride()[:-1])
        for x in tensors
    )


def descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def near(x: Tensor) -> Tensor:
    """``x``, copied where a tile of at most 256 tokens by 256 features would span more than int32 can count."""
    return x if max(x.stride()[-2:]) < 2**22 else x.contiguous()


def sample_strides(x: Tensor) -> tuple[int, int, int]:
    """``stride_n, stride_t, stride_d`` of ``[n, T, d]``, or of ragged rows ``[N, d]``."""
    return x.stride() if x.ndim == 3 else (0, *x.stride())


def precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` does with float32: the user's PyTorch setting, full precision unless it allows tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def narrow(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """``x`` in ``dtype``, contiguous, and what to multiply results by: float16 is too narrow for a direction unscaled."""
    if dtype != torch.float16 or x.dtype == torch.float16 or x.numel() == 0:
        return x.to(dtype).contiguous(), None
    scale = x.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).to(dtype).contiguous(), scale.squeeze(dims)
