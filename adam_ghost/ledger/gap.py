"""How far scores are from adding up to what they should: the one line that tables and the report say of it."""

from typing import NamedTuple

from adam_ghost.ledger.reader import LedgerReader


class Gap(NamedTuple):
    largest: float | None  # None where no step has one
    coverage: float | None  # the least share of the parameters that a step's scores explain
    line: str


def find_gap(ledger: LedgerReader, target: int = 0) -> Gap:
    """The largest gap between a step's scores and its gradient, as ``LedgerReader.gaps`` defines it."""
    rows = [row for row in ledger.gaps(target).to_pylist() if row["gap"] is not None]
    if not rows:
        return Gap(None, None, "No step has scores that could be held against its gradient.")
    worst = max(rows, key=_size)
    line = f"Scores add up to their steps' gradients within {worst['gap']:.1%} (step {worst['step']})"
    least = min(row["coverage"] for row in rows)
    if least < 1:
        line += f"; they cover {least:.1%} of the parameters"
    return Gap(worst["gap"], least, line + ".")


def _size(row: dict) -> float:
    """NaN is the largest."""
    return float("inf") if row["gap"] != row["gap"] else row["gap"]
