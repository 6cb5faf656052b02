"""Which form of a linear layer's products is cheapest: time from counted operations and bytes (kernels/README.md, `Cost model`).

A machine is four ceilings; the defaults are an H200's, as measured with library calls. Counts are of the forms as the kernels
evaluate them; times are floors, meant to rank forms, not to predict them.
"""

from typing import NamedTuple


class Machine(NamedTuple):
    matrix_flops: float = 790e12  # per second, 16-bit matrix instructions
    vector_flops: float = 60e12  # float32 multiply-adds outside them
    bandwidth: float = 4.3e12  # bytes per second
    launch: float = 4e-6  # seconds per kernel


H200 = Machine()


class Cost(NamedTuple):
    """Seconds of each form that applies, by name."""

    seconds: dict[str, float]

    @property
    def best(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)


def _seconds(m: Machine, matrix: float = 0, vector: float = 0, moved: float = 0, launches: int = 1) -> float:
    # vector work between matrix products of one tile adds to them; memory traffic overlaps both
    return max(matrix / m.matrix_flops + vector / m.vector_flops, moved / m.bandwidth) + launches * m.launch


def scores(
    n: int, T: int, K: int, d_out: int, d_in: int, *, itemsize: int = 2, machine: Machine = H200, gradient: bool = True
) -> Cost:
    """Scores of ``n`` samples of ``T`` tokens against ``K`` directions, and the weight gradient where ``gradient`` is wanted too.

    ``contraction``: a product of forward size per direction, beside the library's weight gradient; ``weight gradient``: all in
    one pass, in steps of at least 32 tokens, and a multiply-add per weight, sample and direction.
    """
    weight, tokens = d_out * d_in, n * T
    product, read = 2 * tokens * weight, tokens * (d_in + d_out) * itemsize
    alone = _seconds(machine, product, 0, read + 4 * weight) if gradient else 0.0
    contraction = _seconds(machine, K * product, 2 * K * tokens * d_out, K * read + K * weight * itemsize, 2)
    steps = 2 * n * max(32, -(-T // 32) * 32) * weight
    fused = _seconds(machine, steps, 2 * K * n * weight, read + 4 * weight + K * weight * itemsize, 3)
    return Cost({"contraction": alone + contraction, "weight gradient": fused})
