"""What the order of work costs: bytes that the matrix kernels read from DRAM, by a model of the level-2 cache, and their balance.

The programs of a launch, one per multiprocessor, walk in step; each step of a program asks for one block of each operand, and a
cache that forgets what was used least recently answers. Writes, sectors and the two halves of the cache are left out: a model of
order, not of speed.
"""

from collections import OrderedDict
from collections.abc import Iterator

import torch

from adam_ghost.kernels import contract, wgrad_score
from bench.kernels import LINEARS

PROGRAMS, ARCH, HALF = 132, 90, torch.bfloat16  # an H100's or H200's multiprocessors
CACHE = 40e6  # bytes of 50 MB
DRAM, BALANCE = 1.3, 0.97  # budgets: bytes over the least possible, mean over longest program

Block = tuple[str, int, int]  # operand, and where in it
Walk = list[list[tuple[Block, int]]]  # per step the blocks and their bytes


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def shares(programs: int, units: int) -> Iterator[range]:
    """As ``first_unit`` in kernels/wgrad_score.py shares them out."""
    for q in range(programs):
        yield range(q * units // programs, (q + 1) * units // programs)


def wgrad(n: int, T: int, d_in: int, d_out: int) -> list[Walk]:
    """Every program's steps, as kernels/wgrad_score.py takes them."""
    c = wgrad_score.choose(ARCH, HALF, True, d_out, d_in)
    tiles_o, tiles_i, steps = cdiv(d_out, c.BO), cdiv(d_in, c.BI), n * cdiv(T, c.BT)
    rows, columns = max(tiles_o, tiles_i), min(tiles_o, tiles_i)
    groups = max(1, min(PROGRAMS // columns, rows * steps))
    walks = []
    for share in shares(groups, rows * steps):
        order: list[tuple[int, int]] = []  # rows of tiles, steps of tokens
        for row in range(share.start // steps, cdiv(share.stop, steps)):
            first, last = max(share.start - row * steps, 0), min(share.stop - row * steps, steps)
            begin = aligned_start(first, last, row * steps + first - share.start, rows * steps // groups, steps, cdiv(T, c.BT))
            order += [(row, s) for s in (*range(begin, last), *range(first, begin))]
        for column in range(columns):
            walk: Walk = []
            for row, s in order:
                o, i = (row, column) if tiles_i <= tiles_o else (column, row)
                walk.append([(("b", o, s), c.BO * c.BT * 2), (("a", i, s), c.BI * c.BT * 2)])
            walks.append(walk)
    return walks


def aligned_start(first: int, last: int, done: int, share: int, per: int, steps: int) -> int:
    """As in kernels/wgrad_score.py."""
    meet = first + (done - first) % max(min(share, per), 1)
    begin = (meet + steps // 2) // steps * steps
    return begin if first <= begin < last else first


def contraction(N: int, d_in: int, d_out: int) -> list[Walk]:
    """Every program's steps, as kernels/contract.py takes them."""
    c = contract.choose(ARCH, HALF, True, N, d_out, PROGRAMS)
    tiles_t, tiles_o, group = cdiv(N, c.BT), cdiv(d_out, c.BO), contract.GROUP
    walks: list[Walk] = [[] for _ in range(min(PROGRAMS, tiles_t * tiles_o))]
    for tile in range(tiles_t * tiles_o):
        g, within = divmod(tile, group * tiles_o)
        height = min(tiles_t - g * group, group)
        t, o = g * group + within % height, within // height
        walk = walks[tile % len(walks)]
        walk += [[(("a", t, i), c.BT * c.BI * 2), (("P", o, i), c.BO * c.BI * 2)] for i in range(cdiv(d_in, c.BI))]
        walk[-1].append((("b", t, o), c.BT * c.BO * 2))
    return walks


def dram(walks: list[Walk], size: float = CACHE) -> int:
    """Bytes that a cache of ``size`` bytes does not have when they are asked for."""
    held: OrderedDict[Block, int] = OrderedDict()
    used = missed = 0
    for step in range(max(map(len, walks))):
        for walk in walks:
            for block, of in walk[step] if step < len(walk) else ():
                if block in held:
                    held.move_to_end(block)
                    continue
                missed += of
                held[block] = of
                used += of
                while used > size:
                    used -= held.popitem(last=False)[1]
    return missed


def balance(walks: list[Walk]) -> float:
    """The mean program's steps over the longest's; multiprocessors without a program count."""
    return sum(map(len, walks)) / PROGRAMS / max(map(len, walks))


def measure() -> list[dict]:
    """One row per kernel and shape of ``bench kernels`` with more than one token per sample."""
    found = []
    for name, (n, T, d_in, d_out) in LINEARS.items():
        if T == 1:
            continue
        read = n * T * (d_in + d_out) * 2
        for op, walks, least in (
            ("wgrad_score", wgrad(n, T, d_in, d_out), read),
            ("contract", contraction(n * T, d_in, d_out), read + d_in * d_out * 2),
        ):
            found.append({"op": op, "shape": name, "dram": dram(walks) / least, "balance": balance(walks), "least_mb": least / 1e6})
    return found
