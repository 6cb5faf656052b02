"""``sum over tokens and outputs of (a @ P.T) * b``, per sample or per token; the product never reaches memory.

A matrix product of forward size whose epilogue multiplies by ``b`` and sums each row: one float per token and tile of outputs
leaves the chip. Derivation and counts: README.md, `contract`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adam_ghost.kernels.device import capability, multiprocessors
from adam_ghost.kernels.reduce import per_token as by_token
from adam_ghost.kernels.reduce import sum_samples
from adam_ghost.kernels.tiles import describable, descriptor, matrix_tile, narrow, near, precision, token_tile

GROUP = 22  # blocks of tokens that share a tile of P: six tiles of 132 programs at a time (`bench schedule`)


@triton.jit(do_not_specialize=["N", "K"])
def _contract(
    a, a_t, a_d, b, b_t, b_d, p, part, N, d_in, d_out, K,
    BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, DESC: tl.constexpr,
    FLAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_o = tl.cdiv(d_out, BO)
    columns = tiles_o * K
    tiles_t = tl.cdiv(N, BT)
    o_t = tl.arange(0, BT)
    for tile in tl.range(tl.program_id(0), tiles_t * columns, tl.num_programs(0), flatten=FLAT):
        # GROUP blocks of tokens share each tile of P while it is in cache
        group = tile // (GROUP * columns)
        height = tl.minimum(tiles_t - group * GROUP, GROUP)
        within = tile - group * GROUP * columns
        t, column = (group * GROUP + within % height) * BT, within // height
        k, o = column // tiles_o, column % tiles_o * BO
        zero = tile * 0
        acc = tl.zeros((BT, BO), tl.float32)
        for i in tl.range(0, d_in, BI, num_stages=STAGES):
            b_a = token_tile(a, 0, a_t, a_d, zero, 1, t, N, i, d_in, 1, BT, BI, DESC)
            b_p = matrix_tile(p, k, o, d_out, i, d_in, BO, BI, DESC)
            acc = tl.dot(b_a, b_p.T, acc, input_precision=PRECISION)
        b_b = token_tile(b, 0, b_t, b_d, zero, 1, t, N, o, d_out, 1, BT, BO, DESC)
        tl.store(part + tl.cast(column, tl.int64) * N + t + o_t, tl.sum(acc * b_b.to(tl.float32), 1), mask=t + o_t < N)


class Config(NamedTuple):
    BT: int  # tokens
    BO: int  # outputs
    BI: int  # inputs per step
    warps: int
    stages: int
    descriptors: bool
    flat: bool = False  # persistent programs, tiles and steps in one pipelined loop


def configs(arch: int, dtype: torch.dtype, descriptors: bool) -> list[Config]:
    """What may run on a chip; each compiles without spills."""
    if dtype == torch.float32:
        return [Config(64, 64, 32, 4, 3, False)]
    if not descriptors or arch < 90 or arch >= 120:
        return [Config(128, 128, 32, 8, 3, False), Config(128, 64, 32, 4, 3, False)]
    # the flat loop loads the next tile during this one's end; a small tile leaves fewer multiprocessors without one
    last = Config(128, 128, 64, 8, 4, True, flat=True) if arch >= 100 else Config(128, 128, 64, 4, 3, True)
    return [Config(128, 256, 64, 8, 3, True, flat=True), last]


def choose(arch: int, dtype: torch.dtype, descriptors: bool, N: int, d_out: int, slots: int) -> Config:
    """By the time of the last program on ``slots`` multiprocessors, in products; the same wherever they are as many."""

    def longest(c: Config) -> float:
        tiles, blocks = triton.cdiv(N, c.BT) * triton.cdiv(d_out, c.BO), 2 if c.warps == 4 else 1
        # a small tile reads more for as many products: a 128 x 128 tile's step takes its multiprocessor about an eighth longer
        return triton.cdiv(tiles, slots * blocks) * blocks * c.BT * c.BO * (1 + 32 / c.BT + 32 / c.BO)

    return min(configs(arch, dtype, descriptors), key=longest)


def contract(
    a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None = None, per_token: bool = False, config: Config | None = None
) -> Tensor:
    """``[n, K]``, or per token ``[n, T, K]`` / ``[N, K]``, float32.

    a ``[n, T, d_in]`` and b ``[n, T, d_out]``, or ``[N, d]`` with ``offsets [n + 1]``; one 16-bit dtype or float32.
    """
    tokens, n = a.shape[:-1], a.shape[0] if offsets is None else len(offsets) - 1
    a, b = (near(x.reshape(-1, x.shape[-1])) for x in (a, b))
    P, scale = narrow(P, a.dtype, (1, 2))
    if a.shape[0] == 0 or P.numel() == 0:
        return torch.zeros(*(tokens if per_token else (n,)), len(P), device=a.device)
    if config is None:
        config = choose(capability(), a.dtype, describable(a, b, P), len(a), len(P) * P.shape[1], multiprocessors(a))
    part = _launch(a, b, P, config)
    scores = by_token(part, tokens) if per_token else sum_samples(part, n, offsets)
    return scores if scale is None else scores * scale


def _launch(a: Tensor, b: Tensor, P: Tensor, c: Config) -> Tensor:
    """``[K, tiles of outputs, N]``: each token's part of its score."""
    (N, d_in), (K, d_out, _) = a.shape, P.shape
    tiles_o = triton.cdiv(d_out, c.BO)
    tiles = triton.cdiv(N, c.BT) * tiles_o * K
    part = torch.empty(K, tiles_o, N, device=a.device)
    sources = (a, b, P)
    if c.descriptors:
        sources = (descriptor(a[None], 1, c.BT, c.BI), descriptor(b[None], 1, c.BT, c.BO), descriptor(P, 1, c.BO, c.BI))
    _contract[(min(tiles, multiprocessors(a)) if c.flat else tiles,)](
        sources[0], *a.stride(), sources[1], *b.stride(), sources[2], part, N, d_in, d_out, K, c.BT, c.BO, c.BI, GROUP, c.stages,
        c.descriptors, c.flat, precision(a.dtype), num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return part
