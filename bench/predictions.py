"""What lookahead may know before the backward pass: predictions of the gradient and of the step's midpoint, compared.

Every variant's scores against those of the secant at the true midpoint, in the runs of the fidelity benchmark.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adam_ghost import AdamState
from adam_ghost.layer_cache import LayerCache, open_step
from adam_ghost.step.direction import form_direction, validation_gradient
from adam_ghost.step.step import Step
from bench.fidelity import SETTINGS, STEPS, trained

Predict = Callable[[AdamState, Tensor], Tensor]


def mean(state: AdamState, p: Tensor) -> Tensor:
    """The first moment, its bias corrected."""
    s = state[p]
    return s.exp_avg / (1 - s.scalars.beta1 ** (s.scalars.t - 1))


def size(state: AdamState, p: Tensor) -> Tensor:
    """The second moment's root with the first moment's sign."""
    s = state[p]
    return torch.copysign((s.exp_avg_sq / (1 - s.scalars.beta2 ** (s.scalars.t - 1))).sqrt(), s.exp_avg)


# where the validation gradient is taken, as the gradient of a step to whose midpoint the weights go (None: history alone),
# and the gradient that the secant is formed at
VARIANTS: dict[str, tuple[Predict | None, Predict]] = {
    "history, floored size (lookahead)": (None, AdamState.expected_gradient),
    "history, size": (None, size),
    "history, first moment": (None, mean),
    "history, true gradient": (None, lambda state, p: p.grad),
    "midpoint of first moment, floored size": (mean, AdamState.expected_gradient),
    "midpoint of twice that, floored size": (lambda state, p: 2 * mean(state, p), AdamState.expected_gradient),
    "true midpoint, floored size": (lambda state, p: p.grad, AdamState.expected_gradient),
}


def scores(cache: LayerCache, step: Step, where: Predict | None, at: Predict) -> Tensor:
    going = {name: (where or at)(step.opt_state, p) for name, p in step.params.items()}
    val = validation_gradient(step.opt_state, step.params, going, cache.validation, "lookahead" if where is None else "midpoint")
    expected = {name: at(step.opt_state, p) for name, p in step.params.items()}
    return step.scores(form_direction(step.opt_state, step.params, expected, val, "secant").P).squeeze(-1)


def measure(report: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """One row per step from the tenth on: R and relative L2 of every variant."""
    rows = []
    for batch, beta2, lr in SETTINGS:
        for number, cache, optimizer in trained(batch, beta2, lr, tuple(s for s in STEPS if s >= 10)):
            step = open_step(cache, optimizer)
            true = scores(cache, step, lambda state, p: p.grad, lambda state, p: p.grad)
            row: dict[str, Any] = {"batch": batch, "beta2": beta2, "lr": lr, "step": number}
            for name, (where, at) in VARIANTS.items():
                found = scores(cache, step, where, at)
                r = float(torch.corrcoef(torch.stack([found, true]))[0, 1])
                row[name] = {"r": r, "relative_l2": float((found - true).norm() / true.norm())}
            rows.append(row)
            report(row)
    return rows
