"""Whether a ledger's parts are all there, of one run, and hold what was written."""

import json
import os
from pathlib import Path

from adam_ghost.ledger import layout
from adam_ghost.ledger.layout import pa, pq


class DamagedLedger(RuntimeError):
    """A part of the ledger is missing, damaged or another run's; the message names it."""


class Checker:
    """Checks a folder's parts, each once as long as it stays the same file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._intact: dict[Path, tuple[int, int, int]] = {}

    def check(self, found: dict[str, list[Path]]) -> None:
        """Checks the parts ``found`` of each table.

        Raises:
            DamagedLedger: naming the first part that is wrong.
        """
        for table in layout.TABLES:
            for part in layout.foreign_parts(self.folder, table):
                raise DamagedLedger(f"{part} was not written by a run")
        for parts in found.values():
            for part in parts:
                self._check_bytes(part)
        self._check_runs([part for parts in found.values() for part in parts])
        for rank in sorted({layout.rank_and_number(p)[0] for p in found["steps"]}):
            self._check_rows(rank, found)

    def _check_bytes(self, part: Path) -> None:
        try:
            status = os.stat(part)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._intact.get(part) == stamp:
                return
            if not layout.is_intact(part):
                raise DamagedLedger(f"{part} is damaged: its bytes are not those that were written")
        except FileNotFoundError:
            raise DamagedLedger(f"{part} is missing: it was removed a moment ago") from None
        self._intact[part] = stamp

    def _check_runs(self, parts: list[Path]) -> None:
        owners: dict[int, str | None] = {}
        settings = self.folder / "run.json"
        if settings.exists():
            owners[0] = read_settings(settings).get("run")
        for part in parts:
            rank, owner = layout.rank_and_number(part)[0], layout.settings_of(part).get("run")
            if owner != owners.setdefault(rank, owner):
                raise DamagedLedger(f"{part} is of run {owner}, but this is the ledger of run {owners[rank]}")

    def _check_rows(self, rank: int, found: dict[str, list[Path]]) -> None:
        """Every part of the books has its predecessor, its own steps and the scores that it counts."""
        booked = {n: p for p in found["steps"] for r, n in [layout.rank_and_number(p)] if r == rank}
        parts = {
            table: {n: p for p in found[table] for r, n in [layout.rank_and_number(p)] if r == rank}
            for table in ("scores", "tokens")
        }
        seen: set[tuple[int, int]] = set()
        for number in range(1, max(booked) + 1):
            if number not in booked:
                raise DamagedLedger(f"{layout.part_path(self.folder, 'steps', rank, number)} is missing")
            rows = _read(booked[number], ["step", "target", "samples", "tokens", "skipped"]).to_pylist()
            steps = {(row["step"], row["target"]) for row in rows}
            if len(steps) < len(rows) or steps & seen:
                raise DamagedLedger(f"{booked[number]} has steps that another part has: it was copied")
            seen |= steps
            scored = [row for row in rows if not row["skipped"]]
            for table, counted in (("scores", "samples"), ("tokens", "tokens")):
                self._check_counted(booked[number], table, parts[table].get(number), [r for r in scored if r[counted]], counted)

    def _check_counted(self, books: Path, table: str, part: Path | None, rows: list[dict], counted: str) -> None:
        """The ``part`` of ``table`` holds what the ``rows`` of ``books`` count, of their steps."""
        expected = sum(row[counted] for row in rows)
        named = part or layout.part_path(self.folder, table, *layout.rank_and_number(books))
        if expected and part is None:
            raise DamagedLedger(f"{named} is missing: {books.name} of steps counts {expected} {table} in it")
        there = 0 if part is None else pq.read_metadata(part).num_rows
        if there != expected:
            raise DamagedLedger(f"{named} has {there} {table}, but {books.name} of steps counts {expected}")
        steps = [row["step"] for row in rows]
        if part is not None and steps and _range_of_steps(part) != (min(steps), max(steps)):
            raise DamagedLedger(f"{part} has other steps than {books.name} of steps: it was copied")


def read_settings(path: Path) -> dict:
    """What ``run.json`` says.

    Raises:
        DamagedLedger: it is not JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedLedger(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise DamagedLedger(f"{path} is damaged: it holds no settings of a run")
    return found


def _read(part: Path, columns: list[str]) -> pa.Table:
    return pq.read_table(part, columns=columns, partitioning=None)


def _range_of_steps(part: Path) -> tuple[int, int]:
    footer = pq.read_metadata(part)
    place = footer.schema.names.index("step")
    statistics = [footer.row_group(i).column(place).statistics for i in range(footer.num_row_groups)]
    return min(s.min for s in statistics), max(s.max for s in statistics)
