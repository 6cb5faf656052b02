"""What the validation loss lost, and who took it off: the samples' own steps, or history."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_TOLD = 0.05  # of the drop: what is left over is explained from here on


class Balance(NamedTuple):
    """From the first step that measured the validation loss to each later one, all ``[steps]``."""

    step: np.ndarray
    own: np.ndarray  # sums of scores
    history: np.ndarray  # what momentum and weight decay took off
    drop: np.ndarray  # of the measured loss


def balance(steps: Sequence[Mapping[str, Any]]) -> Balance | None:
    """The balance of booked ``steps`` (rows of that table), up to where each measured the loss; None, if none did."""
    measured = [s["val_loss_at"] is not None and math.isfinite(s["history"] or 0) for s in steps]
    if not any(measured):
        return None
    column = {name: np.array([s[name] for s in steps], dtype=float) for name in ("score_sum", "history", "val_loss", "val_loss_at")}
    # within a step history comes first, then the batch's way, somewhere on which the loss is measured
    own = np.cumsum(column["score_sum"]) - (1 - column["val_loss_at"]) * column["score_sum"]
    history = np.cumsum(column["history"])
    own, history, loss = (x[measured] for x in (own, history, column["val_loss"]))
    step = np.array([s["step"] for s in steps])[measured]
    return Balance(step, own - own[0], history - history[0], loss[0] - loss)


def in_words(steps: Sequence[Mapping[str, Any]], every: int = 1, refresh: int = 1) -> str:
    """Which share of the drop the samples' own steps explain, and which came through momentum."""
    windows = [s["horizon"] for s in steps if s["horizon"] is not None]
    if windows:
        return (
            f"These scores come from windows of steps: each says what a sample did to the validation loss as far as its step's"
            f" window looks, {_range(windows)} on. What momentum carried on within that reach is in the samples' scores, so no"
            " history stands beside them, and they do not add up to one step's drop."
        )
    found = balance(steps)
    if found is None or len(found.step) < 2:
        return "The validation loss was measured in fewer than two of these steps, so there is no drop to hold the scores against."
    drop, own, history = (float(x[-1]) for x in (found.drop, found.own, found.history))
    rest = drop - own - history
    share = (lambda x: f" ({x / drop:.0%})") if drop > 0 else (lambda x: "")
    change = f"fell by {drop:.4g}" if drop > 0 else f"rose by {-drop:.4g}"
    text = (
        f"From step {found.step[0]} to step {found.step[-1]} the validation loss {change}. The samples' own steps took off"
        f" {own:.4g}{share(own)}; {history:.4g}{share(history)} came through momentum and weight decay, which carry on what earlier"
        f" samples did and belong to no sample; {f'{rest:.4g}' if abs(rest) > 1e-4 * abs(drop) else 'nothing'} is left over."
    )
    if not abs(rest) <= _TOLD * abs(drop):
        why = []
        if every > 1:
            why.append("steps between the attributed ones are in neither")
        if refresh > 1:
            why.append("the validation gradient was not taken in every step, and history is of first order")
        text += f" ({'; '.join(why) or 'Gradients that are not finite, or steps that were not attributed, are in neither'}.)"
    return text


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return f"{high} step{'s' * (high != 1)}"
    return f"{low} to {high} steps"
