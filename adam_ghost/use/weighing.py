"""How often to draw the samples of each group: domains, sources, labels."""

from collections.abc import Iterator, Mapping
from math import exp
from typing import TYPE_CHECKING, Any, NamedTuple

from adam_ghost.use.read import opened
from adam_ghost.warn import warn

if TYPE_CHECKING:
    from adam_ghost.use.read import Source

STRENGTH = 4.0  # what a standard deviation above the mean is worth, as a logarithm, unless somebody says otherwise
LEAST_STEPS = 10  # fewer cannot be resampled: their spread is that of too few values


class GroupWeight(NamedTuple):
    """What is known of a group, and what follows from it."""

    group: str
    weight: float  # how often to draw each of its samples, beside 1 for one of a group of which nothing is known
    value: float  # mean standardised score: standard deviations above its steps' mean
    low: float  # 95% interval of value, over resampled steps
    high: float
    samples: int
    reason: str  # why nothing is recommended; empty where something is


class Weights(Mapping[str, float]):
    """Group -> weight. ``rows``: the whole of it, the most helpful group first; printed, a table."""

    def __init__(self, rows: list[GroupWeight]):
        self.rows = rows
        self._weights = {row.group: row.weight for row in rows}

    def __getitem__(self, group: str) -> float:
        return self._weights[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        width = max(len(row.group) for row in self.rows)
        lines = []
        for row in self.rows:
            interval = f"{row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})"
            lines.append(f"{row.group:{width}}  {row.weight:.2f}  {interval}  {row.reason}".rstrip())
        return "\n".join(lines)


def weights(
    ledger: "Source",
    by: str | Mapping[Any, str] = "group",
    *,
    strength: float = STRENGTH,
    target: int = 0,
    steps: tuple[int, int] | None = None,
    bootstrap: int = 1000,
) -> Weights:
    """How often to draw each group's samples, and 1 for every group of which the scores do not say whether it helps.

    A group's weight is ``exp(strength * value)``, where ``value`` is the end of its 95% interval that is nearer to zero: what is
    certain at least. Where the interval holds zero that is a weight of 1, and ``reason`` and a warning say so. Values are mean
    standardised scores, so zero is the mean of what the group was trained along with, whatever the step.

    The interval is of resampled steps. It does not know how the validation data, where that is fixed, or another seed would change
    the scores, and takes the steps of one window as if they were independent.

    Args:
        ledger: open, its folder, or an ``InRun`` that writes one.
        by: ``group``, what the samples were described with, or id -> group; other samples are in ``(none)``.
        strength: what a standard deviation above the mean is worth, as a logarithm.
        target: which of ``K`` validation losses.
        steps: the first and the last step that count, both included.
        bootstrap: how often the steps are resampled.

    Raises:
        TypeError: ``ledger`` is something else.
        ValueError: ``by`` is another string, no sample has a group, nothing was scored, ``target`` is not there, ``bootstrap``
            below 1.
    """
    if isinstance(by, str) and by != "group":
        raise ValueError(f"by must be 'group' or a mapping from id to group, got {by!r}")
    if bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, got {bootstrap}: no weight follows from a value without its interval")
    groups = None if isinstance(by, str) else by
    with opened(ledger) as read:
        found = read.groups(groups, target=target, steps=steps, value="standardized", bootstrap=bootstrap).to_pylist()
    if not found:
        raise ValueError("the ledger has no scores in these steps")
    if [row["group"] for row in found] == ["(none)"]:
        raise ValueError("no sample has a group: give by= a mapping from id to group, or describe the samples (describe_samples)")
    rows = [_weighed(row, strength) for row in found]
    if unknown := [row.group for row in rows if row.reason]:
        warn(f"no weight is recommended, and 1 given, for {', '.join(unknown[:6])}: the scores do not say whether they help")
    return Weights(rows)


def _weighed(row: dict[str, Any], strength: float) -> GroupWeight:
    low, high = row["low"], row["high"]
    reason = ""
    if row["stretches"] < LEAST_STEPS:
        reason = f"met in {row['stretches']} steps, fewer than {LEAST_STEPS}"
    elif low <= 0 <= high:
        reason = "its interval holds zero"
    certain = 0.0 if reason else (low if low > 0 else high)
    return GroupWeight(row["group"], exp(strength * certain), row["value"], low, high, row["samples"], reason)
