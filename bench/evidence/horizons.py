"""Credit for what came later: against leaving one sample out of a step and training on for ``K`` steps."""

from typing import Any

import torch

import adam_ghost as ag
from bench.evidence import scoring
from bench.evidence.tasks import TASKS, States
from bench.statistics import correlation, relative_error

HORIZONS = (1, 3, 10, 30, 100)
STEPS = (41, 81)  # that samples are left out of: past the first, in which the step is the gradient's sign
LEFT_OUT = 16  # samples of each


def measure(task: str, seed: int, lr: float, beta2: float) -> dict[str, Any]:
    """Per horizon, R and relative error at each of ``STEPS``: of the window's credit, and of the one-step scores."""
    t = TASKS[task](seed, lr, beta2, epochs=-(-(max(STEPS) + max(HORIZONS)) // len(TASKS[task](seed, epochs=1).batches)))
    one_step = _one_step(t)
    rows: dict[str, Any] = {}
    truths = {step: _truths(t, step) for step in STEPS}
    for K in HORIZONS:
        credit = _credit(t, K)
        found = {"window": credit, "one step, midpoint": one_step}
        rows[f"K={K}"] = {
            name: [[f(scores[step], truths[step][K]) for f in (correlation, relative_error)] for step in STEPS]
            for name, scores in found.items()
        }
    return {"rows": rows}


def _one_step(task: Any) -> dict[int, torch.Tensor]:
    task = scoring.copied(task)
    optimizer, cache, found = task.optimizer(), ag.LayerCache(task.model, task.val_loss), {}
    for number, _, batch in scoring.training(task, optimizer):
        if number in STEPS:
            with cache:
                task.loss(batch).backward()
            found[number] = ag.attribute(cache, optimizer)[:LEFT_OUT]
        elif number > max(STEPS):
            break
        else:
            task.loss(batch).backward()
    return found


def _credit(task: Any, K: int) -> dict[int, torch.Tensor]:
    """Of the samples of each step to the loss after ``K`` steps."""
    task, first, size = scoring.copied(task), STEPS[0], len(task.batches[0])
    every = STEPS[1] - first
    options = {"window": 1, "ahead": K - 1, "every": every, "train_loss": task.loss}
    optimizer = task.optimizer()
    with ag.InRun(task.model, optimizer, task.val_loss, "window", **options) as run:
        for number, _, batch in scoring.training(task, optimizer):
            run.batch([number * size + i for i in range(size)], inputs=batch)
            task.loss(batch).backward()
    credit = dict(zip(run.scores().ids, run.scores().total.tolist(), strict=True))
    return {s: torch.tensor([credit[s * size + i] for i in range(LEFT_OUT)], dtype=torch.float64) for s in STEPS}


def _truths(task: Any, step: int) -> dict[int, torch.Tensor]:
    """``[LEFT_OUT]`` per horizon: how much more is lost where the sample was left out of the step."""
    before = task.train(task.start(1), 1, step - 1)
    states = States(*({k: x.expand(LEFT_OUT + 1, *x.shape[1:]) for k, x in part.items()} for part in before))
    kept = torch.ones(LEFT_OUT + 1, len(task.batches[0]), dtype=torch.float64)
    kept[range(LEFT_OUT), range(LEFT_OUT)] = 0  # the last model keeps everybody
    everyone, done, found = torch.ones_like(kept), step - 1, {}
    for K in HORIZONS:
        states = task.train(states, done + 1, step + K - 1, lambda t: kept if t == step else everyone)
        done = step + K - 1
        losses = task.outcomes(states).mean(1)
        found[K] = losses[:-1] - losses[-1]
    return found
