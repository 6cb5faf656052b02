"""What is booked of a step: the one definition, which a run fills and the ledger's tables are made of.

A field added here is a column of the table ``steps`` (``layout.steps_schema``), filled by ``rows`` below.
"""

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np

PerTarget = Annotated[list[float], "per target"]  # of K validation losses: one value in each of the step's K rows


@dataclass
class Audit:
    """One step's scores against its exact Shapley values."""

    r: float  # Pearson's correlation
    relative_l2: float
    loss_drop: PerTarget  # U(B): what the batch's gradient really took off the validation loss
    alone: float | None = None  # largest relative difference between recorded gradients and those of two samples alone


@dataclass
class StepRecord:
    """The books of one attributed step."""

    step: int
    samples: int
    lr: list[float]  # per parameter group
    val_loss: PerTarget  # where the validation gradient was last taken
    refreshed: bool  # whether that was in this step
    score_sum: PerTarget
    total: PerTarget  # < P , g(B) >, what the scores must add up to
    history: PerTarget  # what momentum and weight decay took off: by two steps' losses where there are two, or to first order
    coverage: float  # share of the parameters with a gradient that the scores explain
    skipped: bool  # the gradients were not finite and the optimizer did not step: no scores
    seconds: float  # of the host, spent on attribution around this step
    audit: Audit | None = None
    epoch: int | None = None
    every: int = 1  # optimizer steps from one attributed step to the next
    refresh: int = 1  # attributed steps from one validation gradient to the next
    train_loss: float | None = None  # sum of the losses that the loop told
    time: float | None = None  # of booking, seconds since 1970
    val_loss_at: float | None = None  # of the way from the weights after history alone (0) to the step's end; None: elsewhere
    window: int | None = None  # the first step of the window that the scores come from; None: they are the step's own
    horizon: int | None = None  # how many steps after this one their validation loss was looked at
    # share of the parameters with a gradient that layer calls lost, and that passes of the whole model score instead
    by_passes: float = 0.0
    passes: int = 0  # how many such passes the step took: each costs about two forward passes, and fallback=False saves it
    tokens: int = 0  # of the samples, how many had their tokens scored one by one


@dataclass
class Arrived:
    """A step as it is booked; no scores where it was skipped."""

    record: StepRecord
    ids: Sequence[Hashable] = ()
    scores: np.ndarray | None = None  # [n, K], float64
    losses: np.ndarray | None = None  # [n]: each sample's share of the training loss, where the loop told it
    tokens: Sequence[tuple[Hashable, np.ndarray]] = ()  # of some samples: id, [T, K] scores of its tokens in the batch's order
    # [K], [K]: mean and standard deviation of all processes' scores of the step; None: all scores are here
    moments: tuple[np.ndarray, np.ndarray] | None = None


class Column(NamedTuple):
    """A column that a field becomes: of ``audit: Audit | None``, the field ``r`` is the column ``audit_r``, which may be empty."""

    name: str
    type: Any  # int, float, bool, str, list[float] or PerTarget
    optional: bool


@functools.cache
def columns(record: type = StepRecord, prefix: str = "", optional: bool = False) -> tuple[Column, ...]:
    """The columns that the fields of ``record`` become, in their order."""
    found: list[Column] = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        kind, may_lack = _without_none(hint)
        if isinstance(kind, type) and is_dataclass(kind):
            found += columns(kind, f"{prefix}{name}_", optional or may_lack)
        else:
            found.append(Column(prefix + name, kind, optional or may_lack))
    return tuple(found)


def rows(record: StepRecord) -> list[dict[str, Any]]:
    """A step's rows of the table ``steps``, one per target; a skipped step, which has no values per target, has one."""
    values = _flat(record)
    targets = len(record.total) or 1
    found: list[dict[str, Any]] = [{"target": k} for k in range(targets)]
    for name, kind, _ in columns():
        value = values.get(name)
        each = (value or [None] * targets) if kind == PerTarget else [value] * targets
        for row, x in zip(found, each, strict=True):
            row[name] = x
    return found


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        found |= _flat(value, f"{prefix}{field.name}_") if is_dataclass(value) else {prefix + field.name: value}
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``(X, True)`` of ``X | None``, ``(X, False)`` of another ``X``."""
    kinds = get_args(hint)
    if NoneType not in kinds:
        return hint, False
    return next(kind for kind in kinds if kind is not NoneType), True
