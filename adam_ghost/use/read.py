"""Where scores come from: a run that goes on, what it returned, or a ledger."""

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from adam_ghost.inrun import InRun
from adam_ghost.ledger.audits import find_audits
from adam_ghost.run.totals import SampleScores
from adam_ghost.warn import warn

if TYPE_CHECKING:
    from adam_ghost.ledger.reader import LedgerReader

    Source: TypeAlias = InRun | SampleScores | LedgerReader | str | os.PathLike


@contextmanager
def opened(of: "Source") -> Iterator["LedgerReader"]:
    """The ledger of ``of``, as complete as its run is now: a reader, a folder, or a run that writes one; what was opened is closed.

    Raises:
        TypeError: it is something else.
        ValueError: the run has no ledger.
    """
    if isinstance(of, InRun):
        if of.ledger is None:
            raise ValueError("the run has no ledger: give InRun a folder, ledger=")
        of.flush()
        folder = of.ledger.folder
    elif isinstance(of, (str, os.PathLike)):
        folder = Path(of)
    elif isinstance(of, SampleScores) or not hasattr(of, "totals"):
        raise TypeError(f"expected a ledger, open or its folder, or an InRun that writes one, got {type(of).__name__}")
    else:
        of.refresh()
        yield of
        return
    from adam_ghost.ledger.reader import open_ledger  # which needs the extra "ledger"

    with open_ledger(folder) as ledger:
        yield ledger


def ranked(of: "Source", value: str, target: int, steps: tuple[int, int] | None) -> list[tuple[Hashable, float]]:
    """Every sample that was scored, with its ``value`` for ``target``, the most helpful first; arguments as ``InRun.top``'s.

    Warns where audits in the ledger do not bear its scores out.

    Raises:
        TypeError: ``of`` is nothing that has scores.
        ValueError: ``value`` or ``target`` is not there, or ``steps`` is asked of scores without a ledger.
    """
    if isinstance(of, InRun) and steps is None:
        of = of.scores()
    if isinstance(of, SampleScores):
        if steps is not None:
            raise ValueError(f"steps={steps} needs a ledger: scores that were summed up do not remember single steps")
        return of.top(len(of.ids), False, target, value)
    with opened(of) as ledger:
        table: Any = ledger.totals(target=target, steps=steps, value=value)
        audits = find_audits(ledger, target)
    if audits.failed:
        warn(audits.line)
    table = table.sort_by([("value", "descending"), ("sample", "ascending")])
    return list(zip(table["sample"].to_pylist(), table["value"].to_pylist(), strict=True))
