"""A ledger in the terminal while its run writes it."""

import time
from collections.abc import Callable
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from adam_ghost.ledger.audits import find_audits
from adam_ghost.ledger.gap import find_gap
from adam_ghost.ledger.reader import LedgerReader


def watch(
    ledger: LedgerReader,
    console: Console,
    table: Callable[[list[dict[str, Any]], str], RenderableType],
    *,
    k: int = 5,
    target: int = 0,
    every: float = 5.0,
    times: int | None = None,
) -> None:
    """Shows ``ledger`` anew ``every`` so many seconds, ``times`` times, or until Ctrl-C.

    ``table`` makes a table of rows, under a title. Raises ValueError where there is no such ``target``.
    """
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        shown = 0
        while True:
            live.update(_view(ledger, table, k, target), refresh=True)
            shown += 1
            if times is not None and shown >= times:
                return
            try:
                time.sleep(every)
            except KeyboardInterrupt:
                return
            ledger.refresh()


def _view(
    ledger: LedgerReader, table: Callable[[list[dict[str, Any]], str], RenderableType], k: int, target: int
) -> RenderableType:
    if not ledger.targets:
        return Text(f"{ledger.folder}: no step is booked yet")
    (books,) = ledger.sql(
        """SELECT max(step) AS step, count(DISTINCT step) AS attributed, count(DISTINCT step) FILTER (skipped) AS skipped,
           arg_min(val_loss, step) AS first, arg_max(val_loss, step) AS last, max(time) AS time FROM steps WHERE target = ?""",
        [target],
    ).to_pylist()
    found = find_gap(ledger, target)  # which refuses a target that is not there
    (counts,) = ledger.sql("SELECT count(*) AS scores, count(DISTINCT sample) AS samples FROM scores").to_pylist()
    age = "" if books["time"] is None else f", the last one booked {max(0.0, time.time() - books['time']):.0f} s ago"
    lines = [
        f"{ledger.folder}",
        f"step {books['step']}: {books['attributed']} attributed, {books['skipped']} skipped{age}",
        f"{counts['samples']} samples, {counts['scores']} scores",
        found.line,
    ]
    if verdict := find_audits(ledger, target).line:
        lines.append(verdict)
    if books["first"] is not None and books["last"] is not None:
        lines.insert(2, f"validation loss {books['first']:.4g} at first, {books['last']:.4g} now")
    ends = [ledger.top(k, harmful=harmful, target=target).to_pylist() for harmful in (False, True)]
    tables = [table(rows, title) for rows, title in zip(ends, ("Most helpful", "Most harmful"), strict=True)]
    groups = ledger.groups(target=target, bootstrap=0).to_pylist()
    if {row["group"] for row in groups} - {"(none)"}:
        tables.append(table(groups, "Groups"))
    return Group(*map(Text, lines), Columns(tables))
