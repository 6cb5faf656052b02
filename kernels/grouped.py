"""``sum over outputs of (a @ P[expert]) * b`` for rows sorted by expert: a mixture's products, as `contract` does one layer's.

Experts share the rows as ragged samples do: a tile of rows never holds two experts' (`ragged.steps_of`), and no count of rows is
read by the host. Derivation and counts: README.md, `contract_grouped`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.device import capability
from adam_ghost.kernels.ragged import steps_of
from adam_ghost.kernels.tiles import narrow, near, precision, token_tile

GROUP = 8  # blocks of rows that walk through the outputs together: they read the same tiles of P where an expert has many rows


@triton.jit(do_not_specialize=["N", "experts", "steps"])
def _contract_grouped(
    a, a_t, a_d, b, b_t, b_d, p, p_e, p_i, p_o, part, offsets, start_of, expert_of, N, experts, steps, d_in, d_out,
    BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, columns = tl.program_id(0), tl.cdiv(d_out, BO)
    group = tile // (GROUP * columns)
    height = tl.minimum(steps - group * GROUP, GROUP)
    within = tile - group * GROUP * columns
    step, column = group * GROUP + within % height, within // height
    o = column * BO
    expert = tl.load(expert_of + step)
    if expert < experts:
        first, stop = tl.load(offsets + expert).to(tl.int32), tl.load(offsets + expert + 1).to(tl.int32)
        t = first + (step - tl.load(start_of + expert)) * BT
        o_t, o_o, o_i = tl.arange(0, BT), tl.arange(0, BO), tl.arange(0, BI)
        p_p = p + tl.cast(expert, tl.int64) * p_e + (o + o_o).to(tl.int64)[None, :] * p_o
        m_o = (o + o_o < d_out)[None, :]
        acc = tl.zeros((BT, BO), tl.float32)
        for i in tl.range(0, d_in, BI, num_stages=STAGES):
            b_a = token_tile(a, 0, a_t, a_d, t * 0, 1, t, stop, i, d_in, 1, BT, BI, False)
            b_p = tl.load(p_p + (i + o_i).to(tl.int64)[:, None] * p_i, mask=(i + o_i < d_in)[:, None] & m_o, other=0.0)
            acc = tl.dot(b_a, b_p, acc, input_precision=PRECISION)
        b_b = token_tile(b, 0, b_t, b_d, t * 0, 1, t, stop, o, d_out, 1, BT, BO, False)
        tl.store(part + tl.cast(column, tl.int64) * N + t + o_t, tl.sum(acc * b_b.to(tl.float32), 1), mask=t + o_t < stop)


class Config(NamedTuple):
    BT: int  # rows
    BO: int  # outputs
    BI: int  # inputs per step
    warps: int
    stages: int


def configs(arch: int, dtype: torch.dtype) -> list[Config]:
    """What may run on a chip; each compiles without spills."""
    if dtype == torch.float32:
        return [Config(64, 64, 32, 4, 3)]
    BI = 64 if 90 <= arch < 120 else 32
    return [Config(128, 128, BI, 8, 3), Config(64, 128, BI, 4, 3)]


def choose(arch: int, dtype: torch.dtype, N: int, experts: int) -> Config:
    """A tile no higher than an expert's share of the rows: of a higher one the most would be padding."""
    fitting = [c for c in configs(arch, dtype) if c.BT * experts <= N]
    return (fitting or configs(arch, dtype)[-1:])[0]


def contract_grouped(a: Tensor, b: Tensor, P: Tensor, ends: Tensor, config: Config | None = None) -> Tensor:
    """``[N]``, float32; 0 of rows past the last of ``ends``.

    a ``[N, d_in]`` and b ``[N, d_out]``, P ``[E, d_in, d_out]``, ends ``[E]`` int32; one 16-bit dtype or float32.
    """
    (N, d_in), d_out, E = a.shape, b.shape[1], len(P)
    if N == 0 or P.numel() == 0:
        return torch.zeros(N, device=a.device)
    P, scale = _narrow(P, a.dtype)
    if config is None:
        config = choose(capability(), a.dtype, N, E)
    offsets = torch.cat([ends.new_zeros(1), ends])
    plan = steps_of(offsets, N, config.BT)
    columns = triton.cdiv(d_out, config.BO)
    part = torch.zeros(columns, N, device=a.device)
    a, b = near(a), near(b)
    _contract_grouped[(plan.steps * columns,)](
        a, *a.stride(), b, *b.stride(), P, *P.stride(), part, offsets, plan.start_of, plan.sample_of, N, E, plan.steps, d_in, d_out,
        config.BT, config.BO, config.BI, GROUP, config.stages, precision(a.dtype), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    scores = part.sum(0)
    return scores if scale is None else scores * scale


def _narrow(P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``narrow`` of a matrix that may be a transposed view, which is read as it lies."""
    if dtype != torch.float16:
        return P.to(dtype), None
    narrowed, scale = narrow(P[None], dtype, (1, 2, 3))
    return narrowed[0], scale
