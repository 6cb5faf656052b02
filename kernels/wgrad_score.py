"""Weight gradient of a linear layer and every sample's score against ``K`` directions, in one pass over the tokens.

``G = sum over samples of b_i.T @ a_i`` and ``scores[i, k] = < P_k , b_i.T @ a_i >``. Derivation, counts, the choice of prefix
differences and the order of work: README.md, `wgrad_score`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.device import capability, multiprocessors
from adam_ghost.kernels.ragged import Steps, aligned, steps_of
from adam_ghost.kernels.tiles import describable, descriptor, matrix_tile, narrow, near, precision, token_tile


@triton.jit
def first_unit(group, units, groups):
    """Groups share ``units`` evenly: each takes ``first_unit(q) .. first_unit(q + 1)``."""
    return (tl.cast(group, tl.int64) * units // groups).to(tl.int32)


@triton.jit
def group_of(unit, units, groups):
    """Inverse of ``first_unit``: the group that takes ``unit``."""
    return (((tl.cast(unit, tl.int64) + 1) * groups - 1) // units).to(tl.int32)


@triton.jit
def aligned_start(first, last, done, share, per, steps, sample_of, start_of, RAGGED: tl.constexpr):
    """Where in ``first .. last`` of its row a program begins, a sample's first unit or ``first``.

    Near where the other groups are by then, so that all read the same rows of the operand that they share while it is in cache.
    """
    apart = tl.maximum(tl.minimum(share, per), 1)  # units from one front of groups to the next
    meet = first + (done % apart + apart - first % apart) % apart
    if RAGGED:  # noqa: SIM108  the other branch must not be compiled
        begin = tl.load(start_of + tl.load(sample_of + tl.minimum(meet, last - 1)))
    else:
        begin = (meet + steps // 2) // steps * steps
    return tl.where((begin < first) | (begin >= last), first, begin)


@triton.jit(do_not_specialize=["n", "T", "steps", "K"])
def _wgrad_score(
    a, a_n, a_t, a_d, b, b_n, b_t, b_d, p, sample_of, start_of, G, part, dots, n, T, steps, d_in, d_out, K,
    KP: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, RAGGED: tl.constexpr,
    DESC: tl.constexpr, HELD: tl.constexpr, PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_o, tiles_i = tl.cdiv(d_out, BO), tl.cdiv(d_in, BI)
    columns, rows = tl.minimum(tiles_o, tiles_i), tl.maximum(tiles_o, tiles_i)
    # a group's programs walk through the tokens side by side, each in a column: one reads what the others read
    pid, groups = tl.program_id(0), tl.num_programs(0) // columns
    group, column = pid // columns, pid % columns
    per = steps if RAGGED else n * steps  # units of a row: (sample, step of tokens)
    low, high = first_unit(group, rows * per, groups), first_unit(group + 1, rows * per, groups)
    o_k = tl.arange(0, KP)
    for row in tl.range(low // per, tl.cdiv(high, per), num_stages=1):
        o = tl.where(tiles_i <= tiles_o, row, column) * BO
        i = tl.where(tiles_i <= tiles_o, column, row) * BI
        first, last = tl.maximum(low - row * per, 0), tl.minimum(high - row * per, per)
        acc = tl.zeros((BO, BI), tl.float32)
        total = tl.zeros((BO, BI), tl.float32)  # where acc is one sample's
        before = tl.zeros((KP,), tl.float32)
        if HELD:  # one direction: its tile stays in shared memory
            held = matrix_tile(p, row * 0, o, d_out, i, d_in, BO, BI, DESC)
        begin = aligned_start(first, last, row * per + first - low, rows * per // groups, per, steps, sample_of, start_of, RAGGED)
        for unit in tl.range(begin, begin + last - first, num_stages=STAGES):
            s = tl.where(unit < last, unit, unit - last + first)  # round once, through all of the range
            if RAGGED:  # one line of tokens, in which every sample begins at a step
                sample, t, stop, at = tl.load(sample_of + s), s * BT, steps * BT, s * 0
                ends = (s == last - 1) | (tl.load(sample_of + s + 1) != sample)
            else:
                sample, t, stop, at = s // steps, s % steps * BT, T, s // steps
                ends = (s == last - 1) | (s % steps == steps - 1)
            b_b = token_tile(b, b_n, b_t, b_d, at, n, t, stop, o, d_out, 1, BT, BO, DESC)
            b_a = token_tile(a, a_n, a_t, a_d, at, n, t, stop, i, d_in, 1, BT, BI, DESC)
            acc = tl.dot(b_b.T, b_a, acc, input_precision=PRECISION)
            if ends:
                found = tl.zeros((KP,), tl.float32)
                if HELD:
                    found += tl.sum(tl.sum(acc * held.to(tl.float32), 1))
                else:
                    for k in tl.range(0, K, num_stages=1):
                        b_p = matrix_tile(p, k, o, d_out, i, d_in, BO, BI, DESC)
                        found = tl.where(o_k == k, tl.sum(acc * b_p.to(tl.float32)), found)
                slot = tl.cast(row * n + sample + group, tl.int64) * columns + column
                tl.store(dots + slot * K + o_k, found - before, mask=o_k < K)
                if PREFIX:
                    before = found
                else:
                    total += acc
                    acc = tl.zeros((BO, BI), tl.float32)
        total += acc
        o_o, o_i = tl.arange(0, BO), tl.arange(0, BI)
        if (first == 0) & (last == per):
            p_G = G + (tl.cast(o, tl.int64) * d_in + i) + (o_o[:, None] * d_in + o_i[None, :])
            m_G = (o + o_o < d_out)[:, None] & (i + o_i < d_in)[None, :]
            tl.store(p_G, total, mask=m_G)
        else:  # other groups have the rest of the row
            p_part = part + (tl.cast(pid, tl.int64) * 2 + (first == 0)) * (BO * BI)
            tl.store(p_part + (o_o[:, None] * BI + o_i[None, :]), total)


@triton.jit(do_not_specialize=["n", "samples", "steps", "groups", "K"])
def _join(
    part, dots, start_of, G, scores, n, samples, steps, d_in, d_out, groups, K,
    BO: tl.constexpr, BI: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, CP: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Sums what several groups had a part in, in their order: the first programs tiles of ``G``, the others samples' scores."""
    tiles_o, tiles_i = tl.cdiv(d_out, BO), tl.cdiv(d_in, BI)
    columns, rows = tl.minimum(tiles_o, tiles_i), tl.maximum(tiles_o, tiles_i)
    per = steps if RAGGED else n * steps
    units, strips = rows * per, rows * columns * (BO // ROWS)
    pid = tl.program_id(0)
    if pid < strips:
        tile, r = pid // (BO // ROWS), pid % (BO // ROWS) * ROWS
        row, column = tile // columns, tile % columns
        one, end = group_of(row * per, units, groups), group_of(row * per + per - 1, units, groups)
        if one < end:
            o_o, o_i = r + tl.arange(0, ROWS), tl.arange(0, BI)
            o_tile = o_o[:, None] * BI + o_i[None, :]
            acc = tl.load(part + (tl.cast(one * columns + column, tl.int64) * 2 + 1) * (BO * BI) + o_tile)
            for q in tl.range(one + 1, end + 1):
                acc += tl.load(part + tl.cast(q * columns + column, tl.int64) * 2 * (BO * BI) + o_tile)
            o = tl.where(tiles_i <= tiles_o, row, column) * BO + o_o
            i = tl.where(tiles_i <= tiles_o, column, row) * BI + o_i
            p_G, m_G = G + tl.cast(o, tl.int64)[:, None] * d_in + i[None, :], (o < d_out)[:, None] & (i < d_in)[None, :]
            tl.store(p_G, acc, mask=m_G)
    else:
        sample, k = (pid - strips) // K, (pid - strips) % K
        if RAGGED:
            begin, finish = tl.load(start_of + sample), tl.load(start_of + sample + 1)
        else:
            begin, finish = sample * steps, (sample + 1) * steps
        o_c, acc = tl.arange(0, CP), tl.zeros((LINES, CP), tl.float32)
        if begin < finish:  # else a sample without tokens
            for line in tl.range(0, rows, LINES):
                row = line + tl.arange(0, LINES)
                one = group_of(row * per + begin, units, groups)
                end = tl.where(row < rows, group_of(row * per + finish - 1, units, groups), -1)
                most = tl.max(end - one)
                for q in tl.range(0, most + 1):
                    slot = (row * n + sample + one + q).to(tl.int64)
                    mask = (one + q <= end)[:, None] & (o_c < columns)[None, :]
                    acc += tl.load(dots + (slot[:, None] * columns + o_c[None, :]) * K + k, mask=mask, other=0.0)
        tl.store(scores + tl.cast(sample, tl.int64) * K + k, tl.sum(acc))


class Config(NamedTuple):
    BO: int  # tile of the weight: outputs
    BI: int  # and inputs
    BT: int  # tokens per step
    warps: int
    stages: int
    descriptors: bool
    held: bool  # one direction's tile in shared memory


def configs(arch: int, dtype: torch.dtype, descriptors: bool) -> list[Config]:
    """What may run on a chip; each compiles without spills."""
    if dtype == torch.float32:
        return [Config(64, 64, 32, 4, 3, False, False)]
    if not descriptors or arch < 90 or arch >= 120:
        return [Config(64, 128, 32, 8, 3, False, False)]
    small = Config(128, 128, 64, 8, 4, True, True)
    return [Config(128, 256, 64, 8, 3, True, True), small] if arch < 100 else [small]


def choose(arch: int, dtype: torch.dtype, descriptors: bool, d_out: int, d_in: int) -> Config:
    """By the weights that are computed and not there: the large tile reads less, the small one wastes less at the edges."""
    return min(configs(arch, dtype, descriptors), key=lambda c: triton.cdiv(d_out, c.BO) * c.BO * triton.cdiv(d_in, c.BI) * c.BI)


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
    P, scale = narrow(P, a.dtype, (1, 2))
    if config is None:
        # samples of packed rows are copied to where steps begin, and so can always be described if their features can
        able = describable(P, *(x if offsets is None else x[:1] for x in (a, b))) if a.dtype != torch.float32 else False
        config = choose(capability(), a.dtype, able, d_out, d_in)
    plan = None
    if offsets is not None:
        plan = steps_of(offsets, a.shape[0], config.BT)
        a, b = aligned(a, plan, config.BT), aligned(b, plan, config.BT)
    G, scores = _launch(near(a), near(b), P, plan, config)
    return G, scores if scale is None else scores * scale


def _launch(a: Tensor, b: Tensor, P: Tensor, plan: Steps | None, c: Config) -> tuple[Tensor, Tensor]:
    """a ``[n, T, d_in]``; with ``plan`` ``[1, steps * BT, d_in]``, samples at steps. ``P`` contiguous, of a's dtype."""
    K, d_out, d_in = P.shape
    rows, columns = sorted((triton.cdiv(d_out, c.BO), triton.cdiv(d_in, c.BI)), reverse=True)
    samples = a.shape[0] if plan is None else plan.samples
    # the steps past the last sample count as one sample more
    n, steps = (samples, triton.cdiv(a.shape[1], c.BT)) if plan is None else (samples + 1, plan.steps)
    groups = max(1, min(multiprocessors(a) // columns, rows * (steps if plan is not None else n * steps)))
    G = torch.empty(d_out, d_in, device=a.device)
    part = torch.empty(groups * columns * 2, c.BO * c.BI, device=a.device)
    dots = torch.empty(rows * n + groups, columns, K, device=a.device)
    scores = torch.empty(samples, K, device=a.device)
    sources = (
        (descriptor(a, 1, c.BT, c.BI), descriptor(b, 1, c.BT, c.BO), descriptor(P, 1, c.BO, c.BI)) if c.descriptors else (a, b, P)
    )
    sample_of, start_of = (None, None) if plan is None else (plan.sample_of, plan.start_of)
    _wgrad_score[(groups * columns,)](
        sources[0], *a.stride(), sources[1], *b.stride(), sources[2], sample_of, start_of, G, part, dots, n, a.shape[1], steps,
        d_in, d_out, K, triton.next_power_of_2(K), c.BO, c.BI, c.BT, c.stages, plan is not None, c.descriptors, c.held and K == 1,
        a.dtype != torch.float32, precision(a.dtype), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    CP = triton.next_power_of_2(columns)
    _join[(rows * columns * (c.BO // 16) + samples * K,)](
        part, dots, start_of, G, scores, n, samples, steps, d_in, d_out, groups, K, c.BO, c.BI, 16, max(1, 256 // CP), CP,
        plan is not None, num_warps=4, maxnreg=128,
    )  # fmt: skip
    return G, scores
