"""Whole trainings: do summed scores foretell what training on other data gives, and do low ones tell the bad samples?

*LDS* (linear datamodeling score): rank correlation, over random halves of the data, of the halves' summed scores with minus the
validation loss of really training on them. *Groups*: the same, of leaving one of twenty random groups out.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.evidence import scoring
from bench.evidence.tasks import TASKS, Task
from bench.statistics import auroc, correlation, precision

HALVES, GROUPS = 60, 20
RATES = {"digits": 1e-3, "digits, poisoned": 1e-3, "texts": 3e-4}


def retrained(task: Task, keep: Tensor) -> Tensor:
    """``[M]``: minus the validation losses after training on ``keep`` ``[M, N]``, the others' losses being taken for zero."""
    single = task.single()
    states = single.train(single.start(len(keep)), 1, len(task.batches), lambda t: keep[:, task.batches[t - 1]])
    return -single.outcomes(states).mean(1)


def measure(task: str, seed: int, windows: list[str], others: bool = True) -> dict[str, Any]:
    t = TASKS[task](seed, RATES[task])
    N, generator = len(t.bad), torch.Generator().manual_seed(seed)
    halves = torch.rand(HALVES, N, generator=generator) < 0.5
    groups = torch.randperm(N, generator=generator).view(GROUPS, -1)
    without = torch.ones(GROUPS, N, dtype=torch.bool).scatter(1, groups, False)
    keep = torch.cat([halves, without]).double()
    outcomes = retrained(t, keep).double().split([HALVES, GROUPS])
    rows = {}
    for name, scores in scoring.ways(t, windows, others).items():
        of_halves, of_groups = (keep @ scores).split([HALVES, GROUPS])
        rows[name] = {
            "LDS": correlation(of_halves, outcomes[0], ranks=True),
            "groups": correlation(of_groups, outcomes[1], ranks=True),
            "AUROC": auroc(scores, t.bad),
            "precision": precision(scores, t.bad),
        }
    return {"rows": rows}


TARGETS = (10, 30, 100, 300, 1000)


def measure_targets(seed: int, sizes: list[int]) -> dict[str, Any]:
    """LDS of the default windows by validation losses of few and many texts; the truth is the loss of 256 others."""
    t = TASKS["texts"](seed, RATES["texts"], held_out=max(sizes))
    halves = (torch.rand(HALVES, len(t.bad), generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    truth = retrained(replace(t, held_out=t.test), halves)
    rows = {}
    for size in sizes:
        scores = scoring.windows(replace(t, held_out=tuple(x[:size] for x in t.held_out)), *scoring.WINDOWS[scoring.DEFAULT])
        rows[str(size)] = {"LDS": correlation(halves @ scores, truth, ranks=True)}
    return {"rows": rows}


LEFT_OUT, QUERIES = 50, 16
AS_ONE = "the steps as one window"


def measure_queries(seed: int, steps: int = 16) -> dict[str, Any]:
    """Sixteen AdamW steps, fifty samples each left out of them all, and the rank correlation over those, mean over queries."""
    t = TASKS["texts"](seed, held_out=QUERIES, epochs=1)
    t.batches, t.each_target = t.batches[:steps], True
    left_out = torch.cat(t.batches)[torch.randperm(steps * len(t.batches[0]), generator=torch.Generator().manual_seed(seed))]
    keep = torch.ones(LEFT_OUT + 1, len(t.bad), dtype=torch.float64)
    keep[range(LEFT_OUT), left_out[:LEFT_OUT]] = 0
    losses = t.outcomes(t.train(t.start(len(keep)), 1, steps, lambda s: keep[:, t.batches[s - 1]]))  # [M, K]
    truth = losses[:-1] - losses[-1]
    rows = {}
    for name, scores in (scoring.along(t) | {AS_ONE: scoring.windows(t, steps)} | scoring.after_training(t)).items():
        found = [correlation(scores[left_out[:LEFT_OUT], k], truth[:, k], ranks=True) for k in range(QUERIES)]
        rows[name] = {"spearman": sum(found) / QUERIES}
    return {"rows": rows}
