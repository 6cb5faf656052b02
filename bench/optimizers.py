"""The optimizers that ``bench fidelity --optimizer`` trains with, what their rules cost, and what their windows are worth."""

import time
from collections.abc import Callable
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import nn

from adam_ghost.inrun import InRun
from adam_ghost.optim import read_optimizer
from adam_ghost.optim.defined import Coupled

O = torch.optim
Make = Callable[[nn.Module], list[torch.optim.Optimizer]]


def _alone(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Make:
    return lambda model: [kind(model.parameters(), **options)]


def _muon(**options: Any) -> Make:
    """Matrices inside the blocks by Muon, the rest by AdamW."""

    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name]
        held = set(inside)
        return [O.Muon(inside, **options), O.AdamW([p for p in model.parameters() if p not in held], lr=1e-3)]

    return make


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
    "RMSprop": _alone(O.RMSprop, lr=3e-4),
    "RMSprop, centered": _alone(O.RMSprop, lr=1e-4, centered=True, momentum=0.9),  # steps as large as AdamW's
    "RMSprop, centered, lr 3e-4": _alone(O.RMSprop, lr=3e-4, centered=True, momentum=0.9),
    "Adagrad": _alone(O.Adagrad, lr=1e-2),
    "Adamax": _alone(O.Adamax, lr=2e-3),
    "NAdam": _alone(O.NAdam, lr=1e-3),
    "RAdam": _alone(O.RAdam, lr=1e-3),
    "Adafactor": _alone(O.Adafactor, lr=1e-3),
    "Muon and AdamW": _muon(lr=1e-3, adjust_lr_fn="match_rms_adamw"),
    "Muon and AdamW, lr 0.02": _muon(lr=2e-2),
    "Lion": _lion,
    "schedule-free AdamW": _schedule_free,
}


def cost(make: Make, model: nn.Module, rounds: int = 9) -> dict[str, float | None]:
    """What a midpoint and a direction for all parameters of ``model`` take, in this process, interleaved.

    ``cost``: times what AdamW's take; ``of_copy_bandwidth``: the share of the memory's bandwidth, copying, that is reached,
    None where the time is not memory's.
    """
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
    source, target = (torch.empty(sum(p.numel() for p in params)) for _ in range(2))
    seconds["copy"] = (lambda: target.copy_(source.zero_()), [])
    for _ in range(rounds):
        for once, taken in seconds.values():
            start = time.perf_counter()
            once()
            taken.append(time.perf_counter() - start)
    with torch.no_grad():
        for p, w in zip(params, held, strict=True):
            p.copy_(w)
            p.grad = None
    own, adamw, copy = (median(seconds[name][1]) for name in ("own", "AdamW", "copy"))
    # read: weights, gradients, state for the midpoint; gradients, state, validation gradients for the direction; written: both
    kinds = sum(x is not None and x.shape == params[0].shape for x in state.kept(params[:1]).tensors[1:])
    touched = 2 + kinds + 1 + 2 + kinds + 1
    coupled = any(isinstance(read_optimizer(each), Coupled) for each in optimizers)
    return {"cost": own / adamw, "of_copy_bandwidth": None if coupled else touched / 3 * copy / own}  # zeros, and a copy: three


def window_r(training: Any, window: int = 5, samples: int = 8, part: float = 0.01) -> dict[str, float | None]:
    """R of the credit of the first of ``2 window`` steps with what its samples really did: a few of them were left out of it and
    training went on (``window_r``), or a small ``part`` of each was (``window_small_r``). None: no window there.

    The second tells a wrong credit from a training in which a whole sample is no small change.
    """
    if read_optimizer(training.optimizers).not_carried:
        return {"window_r": None, "window_small_r": None}
    batches = [training.draw() for _ in range(2 * window)]
    swept = deepcopy(training)
    options = {"window": window, "ahead": window, "every": 2, "feedback": "double"}
    with InRun(swept.model, swept.optimizers, swept.val_loss, "window", train_loss=swept.loss, **options) as run:
        for step, x in enumerate(batches):
            run.batch([f"{step}.{i}" for i in range(len(x))], inputs=x)
            swept.step(x)
    n = len(batches[0])
    chosen = [round(i * (n - 1) / (samples - 1)) for i in range(samples)]
    credit = torch.from_numpy(run.scores().total).flatten()[chosen]

    def without(sample: int, part: float) -> float:
        again = deepcopy(training)
        weights = torch.ones(n, dtype=torch.float64)
        weights[sample] -= part
        for step, x in enumerate(batches):
            again.step(x, weights if step == 0 else None)
        return again.val_loss().item()

    found: dict[str, float | None] = {}
    for name, size in (("window_r", 1.0), ("window_small_r", part)):
        truth = torch.tensor([without(i, size) for i in chosen], dtype=torch.float64)
        found[name] = float(torch.corrcoef(torch.stack([credit.double(), truth]))[0, 1])
    return found


def slowed(make: Make, by: float) -> Make:
    """The same optimizers with ``by`` times their learning rates."""

    def slow(model: nn.Module) -> list[torch.optim.Optimizer]:
        optimizers = make(model)
        for each in optimizers:
            for group in each.param_groups:
                group["lr"] *= by
        return optimizers

    return slow


def misses(row: dict[str, Any]) -> bool:
    """Whether neither ``midpoint`` nor ``gauss`` has R >= .999 and relative L2 <= .02."""
    return not any(row[at]["r"] >= 0.999 and row[at]["relative_l2"] <= 0.02 for at in ("midpoint", "gauss"))


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["step"] >= 10]


def _best(row: dict[str, Any]) -> dict[str, float]:
    return min((row["midpoint"], row["gauss"]), key=lambda found: found["relative_l2"])


def table(results: list[dict[str, Any]]) -> str:
    """The table of docs/optimizers.md, from what ``bench fidelity --optimizer all`` wrote."""
    lines = [
        "| optimizer | its rule | `midpoint`, steps 10 / 30: R | relative L2 | values' own | `window`: R | cost | of bandwidth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = _rows(result)
        r = " / ".join(f"{row['midpoint']['r']:.4f}" for row in rows)
        error = " / ".join(f"{row['midpoint']['relative_l2']:.3f}" for row in rows)
        own = " / ".join(f"{row['yardstick_error']:.3f}" for row in rows)
        window = "refused" if result["window_r"] is None else f"{result['window_r']:.4f}"
        share = "" if result["of_copy_bandwidth"] is None else f"{result['of_copy_bandwidth']:.0%}"
        cells = (result["optimizer"], result["rule"], r, error, own, window, f"{result['cost']:.1f}", share)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exceptions(results: list[dict[str, Any]]) -> str:
    """Which miss what is asked of them, and what becomes of the error where one of its possible causes is taken away."""
    lines = []
    for result in results:
        for row in filter(misses, _rows(result)):
            best, alone, more, slow = _best(row), row["step_alone"], row["step_alone_64"], row["slowed"]
            lines.append(
                f"* {result['optimizer']}, step {row['step']}: R {best['r']:.4f}, error {best['relative_l2']:.3f}, of which the"
                f" values' own {row['yardstick_error']:.3f}. The step alone, its loss linear: {_found(alone)}; with 64 samples"
                f" {_found(more)}. At a tenth of the learning rate: {_found(slow)}."
            )
        if result["window_r"] is not None and result["window_r"] < 0.98:
            lines.append(
                f"* {result['optimizer']}, window: R {result['window_r']:.4f} with leaving samples out,"
                f" {result['window_small_r']:.4f} with leaving a hundredth of them out; at a tenth of the learning rate"
                f" {result['slowed_window_r']:.4f} with leaving samples out."
            )
    return "\n".join(lines)


def _found(found: dict[str, float]) -> str:
    return f"R {found['r']:.4f}, error {found['relative_l2']:.3f} (own {found['own']:.3f})"
