"""What attribution costs, beside the other ways to the same scores, and how that grows; ratios to steps of the same process."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.data import VOCABULARY
from adam_ghost.demo.model import GPT
from bench.evidence import rivals, scoring
from bench.evidence.tasks import texts
from bench.evidence.whole_run import RATES
from bench.throughput import resident


@dataclass(frozen=True)
class Setting:
    layers: int = 3
    width: int = 192
    tokens: int = 64
    samples: int = 16
    targets: int = 1  # validation samples
    K: int = 1  # validation losses, each of all targets


OURS = {
    "lookahead": ("lookahead", 1),
    "lookahead, every 4th step": ("lookahead", 4),
    "midpoint": ("midpoint", 1),
    "midpoint, every 4th step": ("midpoint", 4),
}
SETTINGS = {
    "r = 1/64": Setting(samples=64),
    "r = 1/16": Setting(),
    "r = 1/2": Setting(targets=8),
}
# the base, and what of it is changed
SMALL = Setting(layers=2, width=128)
GROWTH = {"samples": (4, 16, 64), "tokens": (32, 64, 256), "width": (64, 128, 256), "layers": (1, 2, 4), "K": (1, 4, 16)}


def grown(name: str, value: int) -> dict[str, int]:
    """The small setting with one of its numbers changed."""
    return asdict(SMALL) | {name: value}


def stepper(variant: str, s: Setting) -> Callable[[], Any]:
    """One training step with whatever ``variant`` adds, in the midst of a training."""
    torch.manual_seed(0)
    model = GPT(VOCABULARY, s.tokens, s.layers, s.width, heads=4)
    rival = rivals.RIVALS[variant](model) if variant in rivals.RIVALS else None
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=3e-4)
    x, x_val = torch.randint(0, VOCABULARY, (s.samples + s.targets, s.tokens + 1)).split([s.samples, s.targets])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def val_loss() -> torch.Tensor:
        found = loss(x_val)
        return found if s.K == 1 else found * torch.arange(1, s.K + 1)

    run = None
    if variant in OURS:
        schedule, every = OURS[variant]
        run = ag.InRun(model, optimizer, val_loss, schedule, every=every)

    def step() -> None:
        if rival:
            rival(x, x_val)
        else:
            if run:
                run.batch(range(s.samples))
            loss(x).backward()
            if variant == "bound":
                torch.autograd.grad(loss(x_val), params)
        optimizer.step()
        optimizer.zero_grad()

    step()
    for state in optimizer.state.values():
        state["step"] += 100  # lookahead needs a past
    return step


def measure(setting: dict[str, int], variants: list[str], seconds: float) -> dict[str, Any]:
    """Shares of plain training's and the bound's speed: medians of rounds in which every variant takes four steps in turn."""
    s = Setting(**setting)
    names = [v for v in ("plain", "bound", *variants) if v not in rivals.RIVALS or rivals.installed(v)]
    steps = {v: stepper(v, s) for v in names}
    times: dict[str, list[float]] = {v: [] for v in names}
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times["plain"]) < 5:
        for v in names if len(times["plain"]) % 2 else names[::-1]:  # whoever goes first finds other caches
            begun = time.perf_counter()
            for _ in range(4):
                steps[v]()
            times[v].append(time.perf_counter() - begun)
    rows = {}
    for v in names:
        of = {base: [b / t for b, t in zip(times[base][1:], times[v][1:], strict=True)] for base in ("plain", "bound")}
        rows[v] = {f"of_{base}": statistics.median(x) for base, x in of.items()}
        low, _, high = statistics.quantiles(of["plain"], n=4)
        rows[v]["quartiles"] = [low, high]
    return {"rounds": len(times["plain"]) - 1, "rows": rows}


def measure_ways(steps: int, layers: int, width: int, rounds: int) -> dict[str, Any]:
    """Share of plain training's speed that each way to score the texts' task leaves, in float32, with a larger model.

    Medians of rounds in which all train in turn, after one that is not counted. What scores a trained model, or some of its
    checkpoints, costs the same however long the training was: it is booked to all steps of the task, not to these ``steps``.
    """
    task = texts(0, RATES["texts"])
    of_task = len(task.batches)
    torch.manual_seed(0)
    task.model, task.batches = GPT(VOCABULARY, 32, layers, width, heads=4), task.batches[:steps]
    ways = {"plain": scoring.trained} | scoring.alone()
    scoring.trained(task)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(task)
            times[name].append(time.perf_counter() - begun)
    of_plain = {}
    for name, of in times.items():
        longer = of_task / steps if name in scoring.AFTERWARDS else 1.0
        of_plain[name] = statistics.median(longer * p / (longer * p + t - p) for p, t in zip(times["plain"], of, strict=True))
    return {"parameters": sum(p.numel() for p in task.model.parameters()), "of_plain": of_plain}


def measure_memory(setting: dict[str, int], variant: str) -> dict[str, Any]:
    """The process' peak over three steps; to be called in a process of its own."""
    step = stepper(variant, Setting(**setting))
    for _ in range(3):
        step()
    return {"peak_bytes": resident()}
