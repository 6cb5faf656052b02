"""Training throughput with attribution, as a share of plain training and of the bound (plain plus the bare validation pass).

All variants take their steps in turn within one run, and the medians of their times are compared.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.model import GPT
from bench.experts import with_experts

VARIANTS = ("plain", "bound", "lookahead", "midpoint")
# window, steps ahead, every which window, feedback
WINDOWS = {
    "window 32": (32, 0, 1, "differences"),
    "window 32, 32 ahead, every 4th": (32, 32, 4, "differences"),
    "the same, Gauss-Newton": (32, 32, 4, "gauss-newton"),
}
_BETWEEN = 4  # steps of a window's run between two plain steps that it is compared with


@dataclass(frozen=True)
class Setting:
    """What is trained; the defaults are the published CPU setting, the size of nanoGPT's character model."""

    layers: int = 6
    width: int = 384
    heads: int = 6
    context: int = 256
    vocabulary: int = 65
    batch: int = 16
    val_batch: int = 1
    device: str = "cpu"
    autocast: bool = False
    fused: bool = False
    compiled: bool = False
    experts: int = 0  # of a mixture in place of each perceptron, two to a token

    @property
    def variants(self) -> tuple[str, ...]:
        return VARIANTS[: 3 if self.compiled else 4]  # a compiled model's calls cannot be recorded, which midpoint needs


def stepper(variant: str, s: Setting) -> Callable[[], None]:
    """A function that takes one training step of its own model, in the way of ``variant``, also of ``WINDOWS``."""
    torch.manual_seed(0)
    model = GPT(s.vocabulary, s.context, s.layers, s.width, s.heads)
    model = (with_experts(model, s.experts) if s.experts else model).to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=s.fused)
    tokens = torch.randint(0, s.vocabulary, (s.batch + s.val_batch, s.context + 1), device=s.device)
    x_val = tokens[s.batch :]

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(s.device, torch.bfloat16, enabled=s.autocast):
            return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    if s.compiled:
        model.compile()
    run, x = None, tokens[: s.batch]
    if variant in ("lookahead", "midpoint"):
        run = ag.InRun(model, optimizer, lambda: loss(x_val), variant)
    elif variant in WINDOWS:
        window, ahead, every, feedback = WINDOWS[variant]
        options = {"window": window, "ahead": ahead, "every": every, "feedback": feedback, "train_loss": loss}
        run = ag.InRun(model, optimizer, lambda: loss(x_val), "window", **options)
    params = list(model.parameters())

    def step() -> None:
        if run:
            run.batch(range(s.batch), inputs=x)
        loss(x).backward()
        if variant == "bound":
            torch.autograd.grad(loss(x_val), params)
        optimizer.step()
        optimizer.zero_grad()

    if variant not in WINDOWS:  # whose cycles are counted from the first step
        step()
        for state in optimizer.state.values():
            state["step"] += 100  # as in the midst of a run: lookahead needs a past
    return step


def measure(s: Setting, rounds: int, progress: Callable[[int], None] = lambda k: None) -> dict[str, list[float]]:
    """Seconds of every step of every variant, the variants in turn."""
    steps = {v: stepper(v, s) for v in s.variants}
    times: dict[str, list[float]] = {v: [] for v in s.variants}
    for k in range(-1, rounds):  # a first round warms up
        progress(k)
        # the order alternates: whoever goes first finds other caches
        for v in s.variants if k % 2 else s.variants[::-1]:
            started = time.perf_counter()
            steps[v]()
            if s.device != "cpu":
                torch.cuda.synchronize()
            if k >= 0:
                times[v].append(time.perf_counter() - started)
    return times


def measure_window(variant: str, s: Setting) -> dict[str, float]:
    """One whole cycle of windows, sweep included, as a share of as many plain steps, taken in between; and the peak of memory."""
    plain, step = stepper("plain", s), stepper(variant, s)
    window, _, every, _ = WINDOWS[variant]
    spent, compared = 0.0, []
    for k in range(window * every):
        started = time.perf_counter()
        step()
        spent += time.perf_counter() - started
        if k % _BETWEEN == 0:
            started = time.perf_counter()
            plain()
            compared.append(time.perf_counter() - started)
    return {"of_plain": statistics.median(compared) * window * every / spent, "peak_bytes": resident()}


def measure_windows(s: Setting) -> dict[str, dict[str, float]]:
    """``measure_window`` of every variant, each in a process of its own."""
    found = {}
    for variant in WINDOWS:
        code = f"import json; from bench import throughput as t; print(json.dumps(t.measure_window({variant!r}, t.{s!r})))"
        made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[variant] = json.loads(made.stdout.splitlines()[-1])
    return found


def peak_memory(variant: str, s: Setting) -> int:
    """Bytes at the peak of two steps: of the process, in a process of its own, or of the GPU's allocator."""
    if s.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step = stepper(variant, s)
        step()
        step()
        return torch.cuda.max_memory_allocated()
    code = f"from bench import throughput as t; s = t.stepper({variant!r}, t.{s!r}); s(); s(); print(t.resident())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def resident() -> int:
    # not getrusage, whose maximum a process takes over from the one that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Shares of plain and of the bound, medians over the rounds' own ratios, with the quartiles of the latter."""
    found = {}
    for v in list(times)[1:]:
        row = {}
        for base in ("plain", "bound"):
            ratios = [b / t for b, t in zip(times[base], times[v], strict=True)]
            row[f"of_{base}"] = statistics.median(ratios)
            if len(ratios) > 3:
                row[f"of_{base}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
        found[v] = row
    return found
