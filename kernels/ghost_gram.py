"""``< D * g_i , g_j >`` of a linear layer for all pairs of two sets of samples, ``D = outer(row, col)``, in one pass.

Tile by tile of token pairs, the scaled activation Gram times the scaled output-gradient Gram, summed at once into its pair of
samples. Derivation and counts: README.md, `ghost_gram`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.device import capability, multiprocessors
from adam_ghost.kernels.tiles import describable, descriptor, near, precision, sample_strides, token_range, token_tile


@triton.jit
def token_gram(
    x, x_n, x_t, x_d, y, y_n, y_t, y_d, scale, i, n, t, t_stop, j, m, u, u_stop, d,
    SI: tl.constexpr, BT: tl.constexpr, SJ: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    SCALED: tl.constexpr, DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``(x * scale) @ y.T`` over the features: ``[SI * BT, SJ * BU]``."""
    acc = tl.zeros((SI * BT, SJ * BU), tl.float32)
    for f in tl.range(0, d, BD, num_stages=STAGES):
        b_x = token_tile(x, x_n, x_t, x_d, i, n, t, t_stop, f, d, SI, BT, BD, DESC)
        b_y = token_tile(y, y_n, y_t, y_d, j, m, u, u_stop, f, d, SJ, BU, BD, DESC)
        if SCALED:
            o_f = f + tl.arange(0, BD)
            b_s = tl.load(scale + o_f, mask=o_f < d, other=0.0)
            b_x = (b_x.to(tl.float32) * b_s[None, :]).to(b_x.dtype)
        acc = tl.dot(b_x, b_y.T, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n", "m", "T", "U"])
def _ghost_gram(
    a, a_n, a_t, a_d, b, b_n, b_t, b_d, a2, a2_n, a2_t, a2_d, b2, b2_n, b2_t, b2_d, row, col, offsets, offsets2, out,
    n, m, T, U, d_in, d_out,
    SI: tl.constexpr, BT: tl.constexpr, SJ: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    ROW: tl.constexpr, COL: tl.constexpr, RAGGED: tl.constexpr, RAGGED2: tl.constexpr, SYMMETRIC: tl.constexpr,
    DESC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_j = tl.cdiv(m, SJ)
    i, j = tl.program_id(0) // tiles_j * SI, tl.program_id(0) % tiles_j * SJ
    split, splits = tl.program_id(1), tl.num_programs(1)
    if SYMMETRIC and i > j:
        return  # written by its mirror image
    t_start, t_stop = token_range(offsets, i, T, RAGGED)
    u_start, u_stop = token_range(offsets2, j, U, RAGGED2)
    acc = tl.zeros((SI, SJ), tl.float32)
    for t in tl.range(t_start + split * BT, t_stop, splits * BT, num_stages=1):
        for u in tl.range(u_start, u_stop, BU, num_stages=1):
            b_A = token_gram(
                a, a_n, a_t, a_d, a2, a2_n, a2_t, a2_d, col, i, n, t, t_stop, j, m, u, u_stop, d_in,
                SI, BT, SJ, BU, BD, STAGES, COL, DESC, PRECISION,
            )  # fmt: skip
            b_B = token_gram(
                b, b_n, b_t, b_d, b2, b2_n, b2_t, b2_d, row, i, n, t, t_stop, j, m, u, u_stop, d_out,
                SI, BT, SJ, BU, BD, STAGES, ROW, DESC, PRECISION,
            )  # fmt: skip
            acc += tl.sum(tl.sum((b_A * b_B).reshape(SI, BT, SJ, BU), 3), 1)
    o_i, o_j = i + tl.arange(0, SI)[:, None], j + tl.arange(0, SJ)[None, :]
    p_out, m_out = out + tl.cast(split, tl.int64) * n * m, (o_i < n) & (o_j < m)
    if SYMMETRIC:
        tl.store(p_out + o_j.to(tl.int64) * m + o_i, acc, mask=m_out & (o_i < o_j))
        m_out = m_out & (o_i <= o_j)
    tl.store(p_out + o_i.to(tl.int64) * m + o_j, acc, mask=m_out)


class Config(NamedTuple):
    rows: int  # tokens of the first set in a tile, of one sample or of several short ones
    columns: int  # and of the second
    BD: int  # features per step
    warps: int
    stages: int
    descriptors: bool
    registers: int | None = None  # per thread, where the assembler would rather spill a little than use them


def choose(arch: int, dtype: torch.dtype, descriptors: bool) -> Config:
    """What runs on a chip; compiles without spills."""
    if dtype == torch.float32:
        return Config(64, 64, 16, 8, 1, False, 192)
    if not descriptors or arch < 90 or arch >= 120:
        return Config(128, 64, 32, 8, 3, False)
    return Config(128, 128, 64, 8, 3, True)


def ghost_gram(
    a: Tensor, b: Tensor, a2: Tensor | None, b2: Tensor | None, row: Tensor | None = None, col: Tensor | None = None,
    offsets: Tensor | None = None, offsets2: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """``[n, m]`` float32; without ``a2, b2`` the set against itself, each pair of samples once.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, a2 ``[m, U, d_in]``, b2 ``[m, U, d_out]``, or ``[N, d]`` with offsets; one 16-bit
    dtype or float32; row ``[d_out]`` and col ``[d_in]`` float32.
    """
    symmetric = a2 is None
    if symmetric:
        a2, b2, offsets2 = a, b, offsets
    n, m = (x.shape[0] if o is None else len(o) - 1 for x, o in ((a, offsets), (a2, offsets2)))
    if n * m * a.shape[-2] * a2.shape[-2] * a.shape[-1] * b.shape[-1] == 0:
        return torch.zeros(n, m, device=a.device)
    a, b, a2, b2 = (near(x) for x in (a, b, a2, b2))
    scales = []  # float16 cannot hold 1 / (sqrt(v) + eps): the largest scale becomes 1, and the result takes it back
    if a.dtype == torch.float16:
        row, col = (x if x is None else (scales.append(x.abs().amax()), x / scales[-1].clamp_min(1e-38))[1] for x in (row, col))
    able = offsets is None and offsets2 is None and describable(a, b, a2, b2)
    chosen = choose(capability(), a.dtype, able) if config is None else config
    out = _launch(a, b, a2, b2, row, col, offsets, offsets2, n, m, symmetric, chosen)
    for scale in scales:
        out = out * scale
    return out


def _tokens(x: Tensor, n: int, most: int) -> int:
    """Tokens per sample in a tile: a power of two that holds the sample, or the average one where they are ragged."""
    mean = x.shape[1] if x.ndim == 3 else triton.cdiv(x.shape[0], n)
    return min(most, triton.next_power_of_2(mean))


def _launch(a, b, a2, b2, row, col, offsets, offsets2, n: int, m: int, symmetric: bool, c: Config) -> Tensor:
    ragged, ragged2 = offsets is not None, offsets2 is not None
    BT, BU = _tokens(a, n, c.rows), _tokens(a2, m, c.columns)
    SI, SJ = 1 if ragged else c.rows // BT, 1 if ragged2 else c.columns // BU
    if ragged:
        BT = c.rows
    if ragged2:
        BU = c.columns
    pairs = triton.cdiv(n, SI) * triton.cdiv(m, SJ)
    blocks = triton.cdiv(a.shape[-2] if not ragged else triton.cdiv(a.shape[0], n), BT)
    splits = max(1, min(blocks, 4 * multiprocessors(a) // pairs))
    out = torch.empty(splits, n, m, device=a.device)
    sources = [a, b, a2, b2]
    if c.descriptors:
        sources = [descriptor(x, S, B, c.BD) for x, S, B in ((a, SI, BT), (b, SI, BT), (a2, SJ, BU), (b2, SJ, BU))]
    _ghost_gram[(pairs, splits)](
        sources[0], *sample_strides(a), sources[1], *sample_strides(b), sources[2], *sample_strides(a2), sources[3],
        *sample_strides(b2), row, col, offsets, offsets2, out, n, m, a.shape[-2], a2.shape[-2], a.shape[-1], b.shape[-1],
        SI, BT, SJ, BU, c.BD, c.stages, row is not None, col is not None, ragged, ragged2, symmetric, c.descriptors,
        precision(a.dtype), num_warps=c.warps, num_stages=c.stages, maxnreg=c.registers,
    )  # fmt: skip
    return out.sum(0)
