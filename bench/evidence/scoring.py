"""Every way to score a training's samples, by one call each: ``[N]``, or ``[N, K]`` for ``K`` targets, high = helpful."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import adam_ghost as ag
from bench.evidence import peers
from bench.evidence.tasks import Task

# rule, and where the validation gradient is taken
RULES = {
    "one step, SGD rule": ("sgd", "current"),
    "one step, the paper's rule": ("frozen", "current"),
    "one step, midpoint": ("secant", "midpoint"),
}
STANDARDISED, LATER = "one step, midpoint, standardised", "one step, midpoint, from step 11"
LOOKAHEAD = "one step, lookahead"
ONE_STEP = (*RULES, LOOKAHEAD, STANDARDISED, LATER)
DEFAULT = "windows of 32, 32 ahead"
# window, steps ahead, feedback
WINDOWS = {
    "windows of 8": (8, 0, "auto"),
    "windows of 32": (32, 0, "auto"),
    DEFAULT: (32, 32, "auto"),
    f"{DEFAULT}, Gauss-Newton": (32, 32, "gauss-newton"),
    f"{DEFAULT}, no feedback": (32, 32, "none"),
    "windows of 128": (128, 0, "auto"),
    "the whole run": (10**6, 0, "auto"),
}
SUMMED_LOSS, NORMS, TRACIN = "minus the summed loss", "minus the gradient norms", "TracIn, 10 checkpoints"
AFTERWARDS = (TRACIN, *peers.PEERS)  # at checkpoints or of the trained model, whatever the training's length
ALONG = (*RULES, STANDARDISED, LATER, SUMMED_LOSS, NORMS, TRACIN)  # what one training gives


def copied(task: Task) -> Task:
    return replace(task, model=copy.deepcopy(task.model))


def training(task: Task, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
    """Number, indices and samples of each step; the step follows what the loop does with them."""
    for number, index in enumerate(task.batches, 1):
        yield number, index, task.take(index)
        optimizer.step()
        optimizer.zero_grad()


def windows(task: Task, window: int, ahead: int = 0, feedback: str = "auto") -> Tensor:
    """Total credit of every sample over windows."""
    window = min(window, len(task.batches))
    return in_run(task, "window", window=window, ahead=ahead, feedback=feedback)


def in_run(task: Task, schedule: str, **options: Any) -> Tensor:
    """Total score of every sample in one of the package's schedules."""
    task = copied(task)
    optimizer = task.optimizer()
    kept = schedule == "window"
    if kept:
        options["train_loss"] = task.loss
    with ag.InRun(task.model, optimizer, task.val_loss, schedule, **options) as run:
        for _, index, batch in training(task, optimizer):
            run.batch(index.tolist(), inputs=batch if kept else None)
            task.loss(batch).backward()
    found = run.scores()
    total = torch.zeros(len(task.bad), *found.total.shape[1:], dtype=torch.float64)
    total[torch.tensor(found.ids)] = torch.from_numpy(found.total)
    return total


def along(task: Task, rules: Sequence[str] = tuple(RULES)) -> dict[str, Tensor]:
    """One training, scored step by step: every name of ``ALONG`` but other one-step rules."""
    task = copied(task)
    optimizer = task.optimizer()
    cache = ag.LayerCache(task.model, task.val_loss)
    K = task.val_loss().shape
    names = [name for name in ALONG if name not in RULES or name in rules]
    found = {name: torch.zeros(len(task.bad), *K, dtype=torch.float64) for name in names}
    for number, index, batch in training(task, optimizer):
        if number % max(1, len(task.batches) // 10) == 0:
            found[TRACIN] += task.lr * peers.gradient_dots(task)
        with cache:
            losses = task.losses(task.model(batch[0]), *batch[1:])
            losses.mean().backward()
        for name in rules:
            rule, at = RULES[name]
            found[name][index] += (scores := ag.attribute(cache, optimizer, rule=rule, at=at))
        found[STANDARDISED][index] += (scores - scores.mean(0)) / scores.std(0)  # of the last rule, midpoint
        found[LATER][index] += scores * (number > 10)
        norms = ag.gram(cache, optimizer, preconditioner=None).diagonal().sqrt()
        for name, x in ((SUMMED_LOSS, losses.detach()), (NORMS, norms)):
            found[name][index] -= x.view(-1, *[1] * len(K))
    return found


def ways(task: Task, windows_of: list[str], others: bool = True) -> dict[str, Tensor]:
    """All of the above, and the peers that score a trained model (those whose packages are installed)."""
    found = along(task) | {LOOKAHEAD: in_run(task, "lookahead")}
    found |= {name: windows(task, *WINDOWS[name]) for name in windows_of}
    return found | (after_training(task) if others else {})


def trained(task: Task) -> Task:
    task = copied(task)
    for _, _, batch in training(task, task.optimizer()):
        task.loss(batch).backward()
    return task


def after_training(task: Task) -> dict[str, Tensor]:
    task = trained(task)
    return {name: score(task) for name, score in available().items()}


def by_checkpoints(task: Task) -> Tensor:
    """TracIn alone: what ``along`` finds for it."""
    task = copied(task)
    found = torch.zeros(len(task.bad), *task.val_loss().shape, dtype=torch.float64)
    for number, _, batch in training(task, task.optimizer()):
        if number % max(1, len(task.batches) // 10) == 0:
            found += task.lr * peers.gradient_dots(task)
        task.loss(batch).backward()
    return found


def alone() -> dict[str, Callable[[Task], Any]]:
    """Every way by itself, whole training included, to be timed."""
    in_one_step = {name: partial(in_run, schedule="midpoint", rule=rule) for name, (rule, _) in RULES.items()}
    in_windows = {name: partial(_windows, name) for name in WINDOWS}
    by_peers = {name: partial(_then, score) for name, score in available().items()}
    return in_one_step | {LOOKAHEAD: partial(in_run, schedule="lookahead")} | in_windows | {TRACIN: by_checkpoints} | by_peers


def _windows(name: str, task: Task) -> Tensor:
    return windows(task, *WINDOWS[name])


def _then(score: Callable[[Task], Tensor], task: Task) -> Tensor:
    return score(trained(task))


def available() -> dict[str, Callable[[Task], Tensor]]:
    return {name: score for name, score in peers.PEERS.items() if peers.installed(name)}
