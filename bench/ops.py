"""The variance correction and the adjoint against the same arithmetic in PyTorch's own ops, and the machine's copy bandwidth."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import RULES, StepScalars

STEP = StepScalars(100, 3e-4, 0.9, 0.95, 1e-8, 0.1, decoupled=True)
LARGE = [(2048, 2048)] * 24  # 100.7 million parameters
SMALL, SIZE = 150, 64  # tensors of a model whose every parameter is small, and their size
# floats per element that must be read (params, grads, both moments, val_grads) or written (P); and for the adjoint without L2
# decay, read (grads, both moments, three lambdas) or written (these, and the gradients')
TOUCHED, ADJOINT_TOUCHED = 6, 10
FLOAT = 4


def state(shapes: list[tuple[int, ...]], device: str) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator(device).manual_seed(0)
    new = lambda shape: torch.randn(shape, device=device, generator=generator)  # noqa: E731
    lists = {name: [new(s) for s in shapes] for name in ("params", "grads", "exp_avgs", "val_grads")}
    lists["exp_avg_sqs"] = [new(s).square_() for s in shapes]
    lists["max_exp_avg_sqs"] = [None] * len(shapes)
    return lists


def turns(functions: list[Callable[[], Any]], device: str, rounds: int, calls: int = 1) -> list[list[float]]:
    """Seconds of one call of each function, round by round: they take turns, since the speed of a machine changes."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):  # the first warms up
        for f, found in zip(functions, times, strict=True):
            _wait(device)
            started = time.perf_counter()
            for _ in range(calls):
                f()
            _wait(device)
            found.append((time.perf_counter() - started) / calls)
    return [found[1:] for found in times]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def ratio(of: list[float], to: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def measure(device: str, rounds: int = 11) -> dict[str, Any]:
    """Ratios and, on a GPU, absolute numbers; the overhead is of one call, in microseconds."""
    lists = state(LARGE, device)
    elements = sum(x.numel() for x in lists["params"])
    out, steps = [torch.empty_like(x) for x in lists["val_grads"]], [STEP] * len(LARGE)
    compiled = "cpp" if device == "cpu" else None
    source, target = (torch.empty(elements, device=device) for _ in range(2))
    source.zero_()
    touched = dict.fromkeys(RULES, TOUCHED) | {"adjoint": ADJOINT_TOUCHED}
    calls = {rule: partial(adam_op.variance_correction, **lists, steps=steps, rule=rule, out=out) for rule in RULES}
    calls["adjoint"] = _adjoint(lists, steps, out)
    copy, *ours = turns([lambda: target.copy_(source), *(partial(f, impl=compiled) for f in calls.values())], device, rounds)
    rows = []
    for (name, call), times in zip(calls.items(), ours, strict=True):
        (eager,) = turns([partial(call, impl="reference")], device, 1)
        share = touched[name] / 2 * ratio(copy, times)  # a copy reads and writes each element
        rows.append({"op": name, "of_eager": eager[0] / statistics.median(times), "of_copy_bandwidth": share})
        if device != "cpu":
            took = statistics.median(times)
            rows[-1] |= {"ms": took * 1e3, "gb_per_s": touched[name] * FLOAT * elements / took / 1e9}
    return {"elements": elements, "ops": rows, "overhead_us": overhead(device, compiled)}


def _adjoint(lists: dict[str, list[torch.Tensor]], steps: list[StepScalars], out: list[torch.Tensor]) -> Callable[..., None]:
    held = [lists[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")]
    lambda_m, lambda_v = ([torch.zeros_like(x) for x in out] for _ in range(2))
    return partial(adam_op.adjoint, *held, steps, lists["val_grads"], lambda_m, lambda_v, [], out=out)


def overhead(device: str, impl: str | None, rounds: int = 25, calls: int = 200) -> float:
    """Microseconds of a call for many small tensors, beyond those of a call for one tensor of as many elements."""
    functions = []
    for shapes in [(SIZE,)] * SMALL, [(SIZE * SMALL,)]:
        lists, steps = state(shapes, device), [STEP] * len(shapes)
        out = [torch.empty_like(x) for x in lists["val_grads"]]
        functions.append(partial(adam_op.variance_correction, **lists, steps=steps, out=out, impl=impl))
    many, one = turns(functions, device, rounds, calls)
    return statistics.median(a - b for a, b in zip(many, one, strict=True)) * 1e6
