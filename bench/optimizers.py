"""The optimizers that ``bench fidelity --optimizer`` trains with, what their rules cost, and what their windows are worth."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from adam_ghost.inrun import InRun
from adam_ghost.optim import read_optimizer

O = torch.optim
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


def _alone(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Make:
    return lambda model: [kind(model.parameters(), **options)]


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Matrices inside the blocks by Muon, the rest by AdamW."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
    held = set(inside)
    return [O.Muon(inside, lr=2e-2), O.AdamW([p for p in model.parameters() if p not in held], lr=1e-3)]


def _lion(model: nn.Module) -> list[torch.optim.Optimizer]:
    from lion_pytorch import Lion

    return [Lion(model.parameters(), lr=1e-4)]


def _schedule_free(model: nn.Module) -> list[torch.optim.Optimizer]:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(model.parameters(), lr=1e-3)
    optimizer.train()
    return [optimizer]


OPTIMIZERS: dict[str, Make] = {
    "AdamW": _alone(O.AdamW, lr=1e-3),
    "SGD": _alone(O.SGD, lr=0.03),
    "SGD, momentum": _alone(O.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "RMSprop": _alone(O.RMSprop, lr=1e-3),
    "RMSprop, centered": _alone(O.RMSprop, lr=3e-4, centered=True, momentum=0.9),
    "Adagrad": _alone(O.Adagrad, lr=1e-2),
    "Adamax": _alone(O.Adamax, lr=2e-3),
    "NAdam": _alone(O.NAdam, lr=1e-3),
    "RAdam": _alone(O.RAdam, lr=1e-3),
    "Adafactor": _alone(O.Adafactor, lr=1e-3),
    "Muon and AdamW": _muon,
    "Lion": _lion,
    "schedule-free AdamW": _schedule_free,
}


def cost(make: Make, model: nn.Module, rounds: int = 5) -> float:
    """Times what AdamW's own take, of a midpoint and a direction for all parameters of ``model``; in this process, interleaved."""
    params = [p for p in model.parameters() if p.requires_grad]
    grads, vals = ([torch.randn_like(p) for p in params] for _ in range(2))
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    held, seconds = [p.detach().clone() for p in params], {}
    for name, how in (("AdamW", OPTIMIZERS["AdamW"]), ("own", make)):
        optimizers = how(model)
        for each in optimizers:
            each.step()
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()  # a step may have edited it
        state = read_optimizer(optimizers)
        points, out = ([torch.empty_like(p) for p in params] for _ in range(2))

        def once(state: Any = state, points: Any = points, out: Any = out) -> None:
            state.weight_points(params, grads, mid=points)
            state.linearize(params, grads, vals, state.linearizations[0], out)

        seconds[name] = (once, [])
    for _ in range(rounds):
        for once, taken in seconds.values():
            start = time.perf_counter()
            once()
            taken.append(time.perf_counter() - start)
    with torch.no_grad():
        for p, w in zip(params, held, strict=True):
            p.copy_(w)
            p.grad = None
    return median(seconds["own"][1]) / median(seconds["AdamW"][1])


def window_r(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], val_loss: Callable, loss: Callable, draw: Callable, window: int = 5
) -> float | None:
    """R of the first of ``2 window`` steps' credit with leaving each of 8 samples out and training on; None: no window there."""
    if read_optimizer(optimizers).not_carried:
        return None
    options = {"window": window, "ahead": window, "audit_every": 1, "audit_samples": 8, "feedback": "double"}
    with InRun(model, optimizers, val_loss, "window", train_loss=loss, every=2, **options) as run:
        for step in range(2 * window):
            x = draw()
            run.batch([f"{step}.{i}" for i in range(len(x))], inputs=x)
            loss(x).backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    audits = [s.audit.r for s in run.steps if s.audit is not None]
    return audits[0]


def table(results: list[dict[str, Any]]) -> str:
    """The table of docs/optimizers.md, from what ``bench fidelity --optimizer all`` wrote."""
    lines = [
        "| optimizer | its rule | `midpoint`, steps 10 / 30: R | relative L2 | `window`: R | cost |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = [row["midpoint"] for row in result["rows"] if row["step"] >= 10]
        r = " / ".join(f"{row['r']:.4f}" for row in rows)
        error = " / ".join(f"{row['relative_l2']:.3f}" for row in rows)
        window = "refused" if result["window_r"] is None else f"{result['window_r']:.4f}"
        lines.append(f"| {result['optimizer']} | {result['rule']} | {r} | {error} | {window} | {result['cost']:.1f} |")
    return "\n".join(lines)
