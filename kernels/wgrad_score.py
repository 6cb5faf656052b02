"""Weight gradient of a linear layer and every sample's score against ``K`` directions, in one pass over the tokens.

``G = sum over samples of b_i.T @ a_i`` and ``scores[i, k] = < P_k , b_i.T @ a_i >``. Derivation, counts and the choice of
prefix differences: README.md, `wgrad_score`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.device import capability, multiprocessors
from adam_ghost.kernels.tiles import (
    describable,
    descriptor,
    matrix_tile,
    narrow,
    near,
    precision,
    sample_strides,
    token_range,
    token_tile,
)  # fmt: skip
from adam_ghost.kernels.tune import fastest


@triton.jit
def first_unit(program, units, programs):
    """Programs share ``units`` evenly: each takes ``first_unit(p) .. first_unit(p + 1)``."""
    return (tl.cast(program, tl.int64) * units // programs).to(tl.int32)


@triton.jit
def program_of(unit, units, programs):
    """Inverse of ``first_unit``: the program that takes ``unit``."""
    return (((tl.cast(unit, tl.int64) + 1) * programs - 1) // units).to(tl.int32)


@triton.jit(do_not_specialize=["n", "T", "K"])
def _wgrad_score(
    a, a_n, a_t, a_d, b, b_n, b_t, b_d, p, offsets, G, part, scores, n, T, d_in, d_out, K,
    KP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
    DESC: tl.constexpr, HELD: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    tiles_i = tl.cdiv(d_in, BI)
    units = tl.cdiv(d_out, BO) * tiles_i * n  # (tile, sample), samples fastest
    low, high = first_unit(pid, units, programs), first_unit(pid + 1, units, programs)
    o_k = tl.arange(0, KP)
    for tile in tl.range(low // n, tl.cdiv(high, n), num_stages=1):
        o, i = tile // tiles_i * BO, tile % tiles_i * BI
        first, last = tl.maximum(low - tile * n, 0), tl.minimum(high - tile * n, n)
        total = tl.zeros((BO, BI), tl.float32)
        before = tl.zeros((KP,), tl.float32)
        if HELD:  # one direction: its tile stays in registers
            held = matrix_tile(p, tile * 0, o, d_out, i, d_in, BO, BI, DESC)
        for sample in tl.range(first, last, num_stages=1):
            start, stop = token_range(offsets, sample, T, RAGGED)
            acc = total if PREFIX else tl.zeros((BO, BI), tl.float32)
            for t in tl.range(start, stop, BT, num_stages=STAGES):
                b_b = token_tile(b, b_n, b_t, b_d, sample, n, t, stop, o, d_out, 1, BT, BO, DESC)
                b_a = token_tile(a, a_n, a_t, a_d, sample, n, t, stop, i, d_in, 1, BT, BI, DESC)
                acc = tl.dot(b_b.T, b_a, acc, input_precision=PRECISION)
            dots = tl.zeros((KP,), tl.float32)
            if HELD:
                dots += tl.sum(acc * held.to(tl.float32))
            else:
                for k in tl.range(0, K, num_stages=1):
                    b_p = matrix_tile(p, k, o, d_out, i, d_in, BO, BI, DESC)
                    dots = tl.where(o_k == k, tl.sum(acc * b_p.to(tl.float32)), dots)
            tl.store(scores + (tl.cast(tile, tl.int64) * n + sample) * K + o_k, dots - before, mask=o_k < K)
            if PREFIX:
                total, before = acc, dots
            else:
                total += acc
        o_o, o_i = tl.arange(0, BO), tl.arange(0, BI)
        if (first == 0) & (last == n):
            p_G = G + (tl.cast(o, tl.int64) * d_in + i) + (o_o[:, None] * d_in + o_i[None, :])
            m_G = (o + o_o < d_out)[:, None] & (i + o_i < d_in)[None, :]
            tl.store(p_G, total, mask=m_G)
        else:  # other programs have the rest of the tile's samples
            p_part = part + (tl.cast(pid, tl.int64) * 2 + (first == 0)) * (BO * BI)
            tl.store(p_part + (o_o[:, None] * BI + o_i[None, :]), total)


@triton.jit(do_not_specialize=["n", "programs"])
def _join(part, G, n, d_in, d_out, programs, BO: tl.constexpr, BI: tl.constexpr, ROWS: tl.constexpr):
    """Sums the parts of a tile that several programs shared, in their order."""
    tile, r = tl.program_id(0), tl.program_id(1) * ROWS
    tiles_i = tl.cdiv(d_in, BI)
    units = tl.cdiv(d_out, BO) * tiles_i * n
    one, end = program_of(tile * n, units, programs), program_of(tile * n + n - 1, units, programs)
    if one < end:
        o_o, o_i = r + tl.arange(0, ROWS), tl.arange(0, BI)
        o_tile = o_o[:, None] * BI + o_i[None, :]
        acc = tl.load(part + (tl.cast(one, tl.int64) * 2 + 1) * (BO * BI) + o_tile)
        for q in tl.range(one + 1, end + 1):
            acc += tl.load(part + tl.cast(q, tl.int64) * 2 * (BO * BI) + o_tile)
        o, i = tile // tiles_i * BO + o_o, tile % tiles_i * BI + o_i
        p_G, m_G = G + tl.cast(o, tl.int64)[:, None] * d_in + i[None, :], (o < d_out)[:, None] & (i < d_in)[None, :]
        tl.store(p_G, acc, mask=m_G)


class Config(NamedTuple):
    BO: int  # tile of the weight: outputs
    BI: int  # and inputs
    BT: int  # tokens per step
    warps: int
    stages: int
    descriptors: bool
    held: bool  # one direction's tile in registers


def configs(arch: int, dtype: torch.dtype, descriptors: bool) -> list[Config]:
    """The short list for a chip; each compiles without spills. The first is the default where nothing can be timed."""
    if dtype == torch.float32:
        return [Config(64, 64, 32, 4, 3, False, False)]
    if not descriptors or arch < 90:
        return [Config(64, 128, 32, 8, 3, False, False), Config(128, 64, 32, 8, 3, False, False)]
    if arch < 100:
        # one big tile per multiprocessor, a direction held, or two tiles whose ends overlap each other's products
        return [
            Config(128, 256, 64, 8, 4, True, False),
            Config(128, 128, 64, 8, 4, True, True),
            Config(128, 128, 64, 4, 3, True, False),
        ]
    return [Config(128, 128, 64, 8, 4, True, True)]


def wgrad_score(
    a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None = None, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """``G [d_out, d_in]`` and ``scores [n, K]`` in float32.

    a ``[n, T, d_in]`` and b ``[n, T, d_out]``, or ``[N, d]`` with ``offsets [n + 1]``; one 16-bit dtype or float32.
    """
    d_out, d_in = P.shape[1:]
    n, K = a.shape[0] if offsets is None else len(offsets) - 1, len(P)
    if n == 0 or K == 0 or a.shape[-2] == 0 or d_out * d_in == 0:
        return torch.zeros(d_out, d_in, device=a.device), torch.zeros(n, K, device=a.device)
    a, b = near(a), near(b)
    P, scale = narrow(P, a.dtype, (1, 2))
    arch, able = capability(), offsets is None and describable(a, b, P)
    if config is None:
        key = ("wgrad_score", a.dtype, d_in, d_out, triton.next_power_of_2(K))
        config = fastest(key, configs(arch, a.dtype, able), lambda c: _launch(a, b, P, offsets, c))
    G, scores = _launch(a, b, P, offsets, config)
    return G, scores if scale is None else scores * scale


def _chunks(x: Tensor, units: int, wanted: int) -> int:
    """How many pieces each sample is cut into, so that the units can be shared out evenly."""
    pieces = 1
    while units * pieces < wanted and x.shape[1] % (pieces * 2) == 0 and x.shape[1] // (pieces * 2) >= 256:
        pieces *= 2
    return pieces


def _launch(a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None, c: Config) -> tuple[Tensor, Tensor]:
    K, d_out, d_in = P.shape
    n = a.shape[0] if offsets is None else len(offsets) - 1
    tiles = triton.cdiv(d_out, c.BO) * triton.cdiv(d_in, c.BI)
    slots = multiprocessors(a) * (2 if c.warps == 4 else 1)
    pieces = 1
    if offsets is None and all(x.stride(0) == x.stride(1) * x.shape[1] for x in (a, b)):
        pieces = _chunks(a, tiles * n, 8 * slots)
        a, b = (x.unflatten(1, (pieces, -1)).flatten(0, 1) for x in (a, b))
    units = n * pieces
    programs = min(slots, tiles * units)
    G = torch.empty(d_out, d_in, device=a.device)
    part = torch.empty(programs * 2, c.BO * c.BI, device=a.device)
    scores = torch.empty(tiles, units, K, device=a.device)
    sources = (
        (descriptor(a, 1, c.BT, c.BI), descriptor(b, 1, c.BT, c.BO), descriptor(P, 1, c.BO, c.BI)) if c.descriptors else (a, b, P)
    )
    _wgrad_score[(programs,)](
        sources[0], *sample_strides(a), sources[1], *sample_strides(b), sources[2], offsets, G, part, scores, units,
        a.shape[-2], d_in, d_out, K, triton.next_power_of_2(K), c.BO, c.BI, c.BT, c.stages, offsets is not None,
        c.descriptors, c.held and K == 1, a.dtype != torch.float32, precision(a.dtype),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    _join[(tiles, c.BO // 16)](part, G, units, d_in, d_out, programs, c.BO, c.BI, 16, num_warps=4, maxnreg=128)
    return G, scores.sum(0).unflatten(0, (n, pieces)).sum(1)
