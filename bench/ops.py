"""The variance correction against the same arithmetic in PyTorch's own ops, and against the copy bandwidth of the machine."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adam_ghost import ops
from adam_ghost.reference import RULES, StepScalars

STEP = StepScalars(100, 3e-4, 0.9, 0.95, 1e-8, 0.1, decoupled=True)
LARGE = [(2048, 2048)] * 24  # 100.7 million parameters
SMALL, SIZE = 150, 64  # tensors of a model whose every parameter is small, and their size
TOUCHED = 6  # floats per element that must be read (params, grads, both moments, val_grads) or written (P)
FLOAT = 4


def state(shapes: list[tuple[int, ...]], device: str) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    new = lambda shape: torch.randn(shape, device=device, generator=generator)  # noqa: E731
    lists = {name: [new(s) for s in shapes] for name in ("params", "grads", "exp_avgs", "val_grads")}
    lists["exp_avg_sqs"] = [new(s).square_() for s in shapes]
    lists["max_exp_avg_sqs"] = [None] * len(shapes)
    return lists


def seconds(f: Callable[[], Any], device: str, rounds: int, calls: int = 1) -> float:
    """The median time of one call, over rounds of some calls each."""
    times = []
    for _ in range(rounds + 1):  # the first warms up
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            f()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


def measure(device: str, rounds: int = 7) -> dict[str, Any]:
    """Ratios and, on a GPU, absolute numbers; the overhead is of one call, in microseconds."""
    lists = state(LARGE, device)
    elements = sum(x.numel() for x in lists["params"])
    out, steps = [torch.empty_like(x) for x in lists["val_grads"]], [STEP] * len(LARGE)
    compiled = "cpp" if device == "cpu" else None
    source, target = (torch.empty(elements, device=device) for _ in range(2))
    source.zero_()
    copy = seconds(lambda: target.copy_(source), device, rounds)
    bandwidth = 2 * FLOAT * elements / copy
    rows = []
    for rule in RULES:
        call = partial(ops.variance_correction, **lists, steps=steps, rule=rule, out=out)
        eager, ours = seconds(partial(call, impl="reference"), device, 1), seconds(partial(call, impl=compiled), device, rounds)
        reached = TOUCHED * FLOAT * elements / ours
        rows.append({"rule": rule, "of_eager": eager / ours, "of_copy_bandwidth": reached / bandwidth})
        if device != "cpu":
            rows[-1] |= {"ms": ours * 1e3, "gb_per_s": reached / 1e9}
    return {"elements": elements, "rules": rows, "overhead_us": overhead(device, compiled)}


def overhead(device: str, impl: str | None, calls: int = 200) -> float:
    """Microseconds of a call for many small tensors, beyond those of a call for one tensor of as many elements."""
    times = {}
    for name, shapes in {"many": [(SIZE,)] * SMALL, "one": [(SIZE * SMALL,)]}.items():
        lists, steps = state(shapes, device), [STEP] * len(shapes)
        out = [torch.empty_like(x) for x in lists["val_grads"]]
        call = partial(ops.variance_correction, **lists, steps=steps, out=out, impl=impl)
        times[name] = seconds(call, device, rounds=15, calls=calls)
    return (times["many"] - times["one"]) * 1e6
