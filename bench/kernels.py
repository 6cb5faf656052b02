"""Every Triton kernel against the library call it competes with, at the shapes of known models, beside its floor.

The floor is the larger of operations over the matrix ceiling and bytes over the bandwidth (``cost.H200``). Without a GPU only
floors are told.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.scores import ops
from adam_ghost.scores.cost import H200
from bench.ops import ratio, turns

HALF = 2  # bytes


class Case(NamedTuple):
    op: str
    shape: str
    flops: float
    moved: float  # bytes that have to be read or written
    inputs: Callable[[], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    library: Callable[..., Any]
    rival: str  # what ``library`` is

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.flops / H200.matrix_flops, self.moved / H200.bandwidth)


LINEARS = {  # n, T, d_in, d_out
    "GPT-2 124M qkv": (16, 1024, 768, 2304),
    "GPT-2 124M projection": (16, 1024, 768, 768),
    "GPT-2 124M up": (16, 1024, 768, 3072),
    "GPT-2 124M down": (16, 1024, 3072, 768),
    "GPT-2 124M head": (16, 1024, 768, 50304),
    "Llama-1B attention": (8, 2048, 2048, 2048),
    "Llama-1B up": (8, 2048, 2048, 8192),
    "Llama-1B down": (8, 2048, 8192, 2048),
    "MLP": (4096, 1, 1024, 1024),
}
MIXTURES = {  # n, T, d_in, d_out, experts, experts to a token
    "Mixtral 8x7B down": (8, 2048, 14336, 4096, 8, 2),
    "OLMoE up and gate": (8, 2048, 2048, 2048, 64, 8),
    "OLMoE down": (8, 2048, 1024, 2048, 64, 8),
}
PAIRS = {"n 64, T 256": (64, 256, 768, 768), "n 64, T 16": (64, 16, 768, 3072), "MLP": (4096, 1, 1024, 1024)}


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    return tuple(torch.randn(s, device="cuda", generator=generator).to(dtype) for s in shapes)


def weight_gradient(a: Tensor, b: Tensor, P: Tensor) -> Tensor:
    return b.flatten(0, 1).mT @ a.flatten(0, 1)


def forward(a: Tensor, b: Tensor, P: Tensor) -> Tensor:
    return F.linear(a, P[0])


def routed(N: int, d_in: int, d_out: int, experts: int) -> tuple[Tensor, ...]:
    """Rows, their experts drawn at random, gradients, weights, and where each expert's rows end."""
    generator = torch.Generator("cuda").manual_seed(0)
    counts = torch.randint(experts, (N,), device="cuda", generator=generator).bincount(minlength=experts)
    return *draw((N, d_in), (N, d_out), (experts, d_in, d_out)), counts.cumsum(0, dtype=torch.int32)


def grouped_forward(a: Tensor, b: Tensor, P: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a, P, offs=ends)


def two_einsums(a: Tensor, b: Tensor) -> Tensor:
    return (torch.einsum("itd,jud->ijtu", a, a) * torch.einsum("itd,jud->ijtu", b, b)).sum((2, 3))


def normalized(x: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (F.layer_norm(x, x.shape[-1:], weight[0], bias[0]) * b).sum((1, 2))


def looked_up(indices: Tensor, b: Tensor, P: Tensor) -> Tensor:
    return (P[0][indices] * b).sum((1, 2))


def cases() -> Iterator[Case]:
    for name, (n, T, d_in, d_out) in LINEARS.items():
        shape = f"{name}: {n} x {T}, {d_in} to {d_out}"
        inputs = partial(draw, (n, T, d_in), (n, T, d_out), (1, d_out, d_in))
        product, read = 2 * n * T * d_in * d_out, HALF * (n * T * (d_in + d_out) + d_in * d_out)
        yield Case("contract", shape, product, read, inputs, ops.contract, forward, "forward product")
        # the gradient is written in float32
        moved = read + 2 * HALF * d_in * d_out
        fused = partial(ops.wgrad_score, impl="triton")
        yield Case("wgrad_score", shape, product, moved, inputs, fused, weight_gradient, "weight gradient")
    for name, (n, T, d_in, d_out, experts, top) in MIXTURES.items():
        N, shape = n * T * top, f"{name}: {n} x {T} x {top} rows, {experts} experts, {d_in} to {d_out}"
        product, read = 2 * N * d_in * d_out, HALF * (N * (d_in + d_out) + experts * d_in * d_out)
        inputs = partial(routed, N, d_in, d_out, experts)
        yield Case("contract_grouped", shape, product, read, inputs, ops.contract_grouped, grouped_forward, "grouped product")
    for name, (n, T, d_in, d_out) in PAIRS.items():
        flops, moved = n * (n + 1) * T * T * (d_in + d_out), HALF * n * T * (d_in + d_out)
        inputs, shape = partial(draw, (n, T, d_in), (n, T, d_out)), f"{name}: {d_in} to {d_out}"
        yield Case("ghost_gram", shape, flops, moved, inputs, ops.ghost_gram, two_einsums, "two einsums")
    n, T, d, rows = 16, 1024, 768, 50257
    moved = n * T * (8 + HALF * d + 4 * d)

    def tokens() -> tuple[Tensor, ...]:
        return torch.randint(rows, (n, T), device="cuda"), *draw((n, T, d)), *draw((1, rows, d), dtype=torch.float32)

    yield Case("embedding_score", f"{n} x {T}, {rows} rows of {d}", 0, moved, tokens, ops.embedding_score, looked_up, "unfused")

    def rows_of() -> tuple[Tensor, ...]:
        return draw((n, T, d), (n, T, d), (1, d), (1, d))

    norm = lambda x, b, weight, bias: ops.norm_score(x, b, weight, bias, 1e-5, "layer")  # noqa: E731
    yield Case("norm_score", f"{n} x {T} rows of {d}", 0, HALF * 2 * n * T * d, rows_of, norm, normalized, "unfused")


def measure(report: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """One row per case; times in milliseconds, ``ratio`` is ours over the library's."""
    rows = []
    for case in cases():
        row: dict[str, Any] = {"op": case.op, "shape": case.shape, "against": case.rival, "floor_ms": case.floor * 1e3}
        if torch.cuda.is_available():
            inputs = case.inputs()
            times = turns([partial(f, *inputs) for f in (case.ours, case.library)], "cuda", rounds=9, calls=20)
            ours, library = map(statistics.median, times)
            row |= {"ms": ours * 1e3, "library_ms": library * 1e3, "ratio": ratio(*times)}
            row |= {"tflop_per_s": case.flops / ours / 1e12, "gb_per_s": case.moved / ours / 1e9}
        rows.append(row)
        report(row)
    return rows
