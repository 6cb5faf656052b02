"""The books of a run: what its scores and its history add up to, against what the validation loss really lost."""

from typing import Any

import torch

import adam_ghost as ag
from bench.evidence.tasks import Task, digits

RUNS = [(1e-3, 250), (1e-2, 400)]  # learning rate, steps
SCHEDULES = ("midpoint", "gauss", "lookahead")


def measure(lr: float, steps: int, schedule: str, seed: int = 0) -> dict[str, Any]:
    """Trains on the digits by Adam without weight decay, so that history is momentum alone.

    The run's history is what the losses at successive points leave for it, so that its sum with the scores has to close;
    ``own_steps_measured`` is found otherwise: every step is also taken without its batch.
    """
    task = digits(seed, lr, epochs=-(-steps // 20))  # of 20 steps each
    optimizer = task.optimizer()
    before, measured = float(task.val_loss().detach()), 0.0
    with ag.InRun(task.model, optimizer, task.val_loss, schedule) as run:
        for index in task.batches[:steps]:
            run.batch(index)
            task.loss(task.take(index)).backward()
            without = loss_without_batch(task, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            measured += without - float(task.val_loss().detach())
    drop = before - float(task.val_loss().detach())
    scores, history = (sum(getattr(s, name)[0] for s in run.steps) for name in ("score_sum", "history"))
    found = {"drop": drop, "scores": scores, "history": history, "off": (scores + history - drop) / drop}
    shares = {"own_steps": scores / drop, "own_steps_measured": measured / drop, "momentum": history / drop}
    return {"lr": lr, "steps": steps, "schedule": schedule, **found, **shares}


@torch.no_grad()
def loss_without_batch(task: Task, optimizer: torch.optim.Optimizer) -> float:
    """The validation loss after the step that history would take alone."""
    state, params = ag.AdamState.of(optimizer), list(task.model.parameters())
    held = [p.clone() for p in params]
    for p in params:
        p.data.copy_(state.empty_weights(p))
    loss = float(task.val_loss())
    for p, w in zip(params, held, strict=True):
        p.data.copy_(w)
    return loss
