"""What a run's own audits say of its scores: the one line that tables and the report put beside them."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from adam_ghost.ledger.reader import LedgerReader

MIN_R = 0.9
# of the validation loss, what rounding in float32 leaves of the difference of two: an audit of a drop that small tells nothing
_ROUNDING = 2**-20


class Audits(NamedTuple):
    rows: list[dict[str, Any]]  # a step a row, in their order
    failed: list[int]  # steps whose correlation with the truth is too small
    line: str  # empty where no step was audited


def find_audits(ledger: "LedgerReader", target: int = 0, minimum: float = MIN_R) -> Audits:
    """The audited steps; those that ``failed`` have an ``r`` below ``minimum``, and lowered the loss by what it can tell."""
    rows = ledger.sql(
        """SELECT step, audit_r AS r, audit_relative_l2 AS relative_l2, score_sum, audit_loss_drop AS loss_drop,
           audit_alone AS alone, abs(score_sum - audit_loss_drop) / nullif(abs(audit_loss_drop), 0) AS off, val_loss FROM steps
           WHERE audit_r IS NOT NULL AND target = ? ORDER BY step""",
        [target],
    ).to_pylist()
    drowned = [row["step"] for row in rows if _drowned(row["loss_drop"], row.pop("val_loss"))]
    failed = [row["step"] for row in rows if not row["r"] >= minimum and row["step"] not in drowned]
    line = ""
    if failed:
        one = len(failed) == 1
        line = (
            f"The run's own audits do not bear these scores out: in {len(failed)} of {len(rows)} audited steps ({listed(failed)})"
            f" {'its' if one else 'their'} correlation with the truth is below {minimum:g}."
        )
    elif len(drowned) < len(rows):
        least = min(row["r"] for row in rows if row["step"] not in drowned)
        line = f"Audits of {len(rows) - len(drowned)} steps bear the scores out: R of {least:.3f} at least."
    if drowned:
        line += f" In {len(drowned)} audited steps ({listed(drowned)}) the loss moved by less than it can be told in float32."
    return Audits(rows, failed, line.strip())


def _drowned(drop: float | None, loss: float | None) -> bool:
    return drop is not None and loss is not None and abs(drop) < _ROUNDING * abs(loss)


def listed(steps: list[int], most: int = 6) -> str:
    """``steps 3, 5, 8``, the first few of them."""
    shown = ", ".join(map(str, steps[:most])) + (", …" if len(steps) > most else "")
    return f"step{'s' if len(steps) > 1 else ''} {shown}"
