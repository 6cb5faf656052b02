"""The writing side: takes steps from the training thread, writes parts on its own."""

import json
import os
import platform
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from adam_ghost import __version__
from adam_ghost.ledger import books, layout, leaving
from adam_ghost.ledger.books import Arrived
from adam_ghost.ledger.ids import check_ids, clean
from adam_ghost.ledger.layout import pa, pq
from adam_ghost.ledger.lock import Lock
from adam_ghost.warn import warn

DESCRIPTION = ("group", "text", "path", "image", "tokens")
_TEXT = 2000  # characters kept of a sample's text
_BEHIND = 4  # buffers that may wait for the disk before training does


class LedgerWriter:
    """Writes one run's ledger; pass it as ``InRun(..., ledger=LedgerWriter(DIR, ...))`` where ``ledger=DIR`` is not enough.

    Rows wait in a buffer, which a thread writes as one part when it is ``flush_rows`` long or ``flush_seconds`` old. A kill at
    any moment loses at most that buffer; the end of the program, an exception and SIGTERM lose nothing. Training waits for the
    disk only when four buffers do.

    Args:
        folder: of this run alone; created if missing. Ranks share it.
        flush_seconds: how old the buffer's first row becomes, in seconds.
        flush_rows: how many rows of scores the buffer holds.
        on_error: what a full or failing disk does: ``warn`` once, stop the ledger and go on training, or ``raise`` in training.
        describe: called with an id before its first batch, on the training thread; returns a mapping with any of ``group``,
            ``text``, ``path`` (strings), ``image`` (bytes of a PNG, JPEG, GIF or WebP) and ``tokens`` (a list of strings: what
            each token of its row of the batch says), which tables and the report show.
            ``adam_ghost.describe_samples(folder, ...)`` does the same after the run.
        restart: throw away what the folder holds of an earlier run, instead of refusing it.
        rank: of this process among those that share the folder; ``torch.distributed``'s, if None.

    Raises:
        Locked: another writer holds the folder.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        flush_seconds: float = 30.0,
        flush_rows: int = 200_000,
        on_error: str = "warn",
        describe: Callable[[Any], Mapping[str, Any] | None] | None = None,
        restart: bool = False,
        rank: int | None = None,
    ):
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be warn or raise, got {on_error!r}")
        if not flush_seconds > 0 or flush_rows < 1:
            raise ValueError(f"flush_seconds and flush_rows must be positive, got {flush_seconds} and {flush_rows}")
        self.folder = Path(folder).absolute()  # whatever the working directory becomes
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"ledger must be a folder, but {self.folder} is a file")
        self.flush_seconds, self.flush_rows, self.on_error = flush_seconds, flush_rows, on_error
        self.rank = _rank() if rank is None else rank
        self._ranks: int | None = None  # how many share the folder, where that is known
        self.run = uuid.uuid4().hex
        self.error: BaseException | None = None
        self._describe = describe
        self._described: set[Hashable] = set()
        self._started, self._closed = False, False
        self._checkpointed = False  # whether some state says where to go on from
        self._warned = False
        self._process = os.getpid()
        self._filled_by: weakref.ref[leaving.Holder] | None = None
        self._lock = Lock(self.folder / f"r{self.rank}.lock")
        self._restart = restart
        if restart:
            self._cut_after([])
        self._described_run: dict[str, Any] = {}
        self._schema_metadata: dict[bytes, bytes] = {}
        self._id_type: type | None = None
        self._steps: list[Arrived] = []
        self._samples: list[dict[str, Any]] = []
        self._waiting = 0  # rows handed over and not yet written
        self._number = 0  # of the last part
        self._since = 0.0
        self._flush, self._stop = False, False
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    # what InRun calls

    def claim(self, run: leaving.Holder) -> None:
        """Makes this the ledger of ``run``, which is asked for what it still holds when the process ends.

        Raises:
            RuntimeError: it is another run's, or closed.
        """
        if self._closed:
            raise RuntimeError(f"ledger: the LedgerWriter of {self.folder} is closed; each run needs one of its own")
        if self._filled_by is not None:
            raise RuntimeError(f"ledger: the LedgerWriter of {self.folder} is another run's; each run needs one of its own")
        self._filled_by = weakref.ref(run)

    def share(self, run: str, ranks: int) -> None:
        """The folder is written by ``ranks`` processes, as the one ``run``."""
        self.run, self._ranks = run, ranks
        if self._restart:
            self._cut_after([])

    def _ours(self) -> list[int]:
        """The ranks that are this process's to look after: its own and, for the first, those that no process has any more."""
        if self.rank or self._ranks is None:
            return [self.rank]
        there = {layout.rank_and_number(p)[0] for table in layout.TABLES for p in layout.parts(self.folder, table)}
        return [0, *sorted(rank for rank in there if rank >= self._ranks)]

    def _parts(self, *tables: str) -> list[Path]:
        return [p for rank in self._ours() for table in tables for p in layout.parts(self.folder, table, rank)]

    @property
    def holder(self) -> leaving.Holder:
        """The run, which may hold steps that have not arrived here; this, if it is gone."""
        return (self._filled_by and self._filled_by()) or self

    def begin(self, ids: Sequence[Hashable], settings: Callable[[], Mapping[str, Any]]) -> None:
        """Called before a batch of ``ids``: refuses ids that cannot be written; at first, a folder that is not free for this run.

        Raises:
            RuntimeError: the writer is closed.
            TypeError: ids that are neither integers nor strings, or not of the kind they were; a description of a wrong kind.
            ValueError: the folder holds an earlier run's ledger.
        """
        if self._closed:
            raise RuntimeError(f"the ledger in {self.folder} is closed")
        if os.getpid() != self._process:
            raise RuntimeError(f"the ledger in {self.folder} is written by process {self._process}, which forked this one")
        self._id_type = check_ids(ids, self._id_type)
        if not self._started:
            if self._parts("scores", "steps"):
                self.refuse_earlier()
            self._start(settings())
        if self._describe is not None and self.error is None:
            self._look_up(ids, self._describe)

    def cannot_go_on(self) -> bool:
        """Whether the folder holds an earlier run's ledger of which no checkpoint was made: ``resume`` cannot be what follows."""
        return bool(self._parts("scores", "steps")) and not layout.was_checkpointed(self.folder)

    def refuse_earlier(self) -> NoReturn:
        """Raises the ValueError of a folder that is not free for this run."""
        raise ValueError(
            f"{self.folder} holds the ledger of an earlier run: continue that one with load_state_dict() before the first"
            " batch, choose another folder, or throw it away with LedgerWriter(folder, restart=True)"
        )

    def checkpoint(self) -> dict[str, Any]:
        """Where the ledger stands after ``flush``: the run, and the last part of each rank looked after here."""
        if self.rank == 0 and not self._checkpointed and self._started:
            layout.write_json(self._described_run | {"checkpointed": True}, self.folder / "run.json")
        self._checkpointed = True
        parts = {rank: self._last_booked(rank) for rank in self._ours()}
        return {"run": self.run, "parts": [parts.get(rank, 0) for rank in range(max(parts) + 1)]}

    def resume(self, position: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> None:
        """Continues from a ``position``: what the ledger holds beyond it is thrown away. None: the run had no ledger.

        ``parts`` has the last part of every rank that the folder has had; other processes throw away what is theirs.

        Raises:
            RuntimeError: this run's ledger has begun.
            ValueError: the folder holds another run's ledger, or less than it did; nothing is changed.
        """
        if self._started:
            raise RuntimeError("load_state_dict() comes before the first batch: this run's ledger has begun")
        run, last = (self.run, []) if position is None else (position["run"], position["parts"])
        found = self._parts("scores", "steps")
        for part in found:
            if (owner := layout.settings_of(part).get("run")) != run:
                raise ValueError(f"{self.folder} holds the ledger of run {owner}, but the checkpoint is of run {run}")
        for rank in self._ours():
            there, known = self._last_booked(rank), _last_of(rank, last)
            if found and there < known:
                raise ValueError(f"{self.folder} ends with part {there}, but the checkpoint was made after part {known}")
        self.run, self._checkpointed = run, True
        self._cut_after(last)
        self._start(settings)

    def add(self, step: Arrived) -> None:
        """Hands over one step. Returns at once.

        Raises:
            RuntimeError: the writer is closed.
            OSError: the disk failed, and ``on_error="raise"``.
        """
        if self._closed:
            raise RuntimeError(f"the ledger in {self.folder} is closed")
        if not self._running():
            return
        if step.record.time is None:
            step.record.time = time.time()
        with self._condition:
            self._condition.wait_for(lambda: self._waiting < _BEHIND * self.flush_rows or self.error is not None)
            if not self._steps:
                self._since = time.monotonic()
            self._steps.append(step)
            before, self._waiting = self._waiting, self._waiting + _size(step)
            if before < self.flush_rows <= self._waiting or len(self._steps) == 1:
                self._condition.notify_all()

    def flush(self) -> None:
        """Waits until everything handed over is on the disk."""
        with self._condition:
            if self._thread is None or os.getpid() != self._process:  # a forked child has no thread, and nothing to write
                return
            self._flush = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._flush or self.error is not None)
        self._running()

    def close(self) -> None:
        """Writes what waits, and lets go of the folder."""
        if os.getpid() != self._process:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            if self._thread is not None:
                with self._condition:
                    self._stop = True
                    self._condition.notify_all()
                self._thread.join()
                self._thread = None
            self._lock.release()
            leaving.leave_alone(self)

    # the thread's side

    def _start(self, settings: Mapping[str, Any]) -> None:
        described = {"format": layout.FORMAT, "run": self.run, "created": time.time(), "settings": dict(settings)}
        described["versions"] = _versions()
        self._described_run = described
        self._schema_metadata = {layout.METADATA: json.dumps(described).encode()}
        layout.remove_leftovers(self.folder, self.rank)
        if self.rank == 0:
            layout.write_json(described | {"checkpointed": self._checkpointed}, self.folder / "run.json")
        self._number = self._last_booked(self.rank)
        for part in layout.parts(self.folder, "scores", self.rank)[:1]:
            self._id_type = int if pq.read_schema(part).field("sample").type == pa.int64() else str
        self._started = True
        self._thread = threading.Thread(target=self._work, name="adam_ghost ledger", daemon=True)
        self._thread.start()
        leaving.watch(self)

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._due() and not self._stop:
                    self._condition.wait(max(0.0, self._left()) if self._steps else None)
                if self._stop and not self._steps:
                    return
                steps, self._steps = self._steps, []
                samples: list[dict[str, Any]] = []
                if steps:  # a part of descriptions alone would have a number that no part of the books has
                    samples, self._samples = self._samples, []
            try:
                if steps:
                    self._write(steps, samples)
            except Exception as error:
                with self._condition:
                    self.error, self._steps, self._samples = error, [], []
                    self._condition.notify_all()
                return
            with self._condition:
                self._waiting = sum(map(_size, self._steps))
                if not self._steps:
                    self._flush = False
                self._condition.notify_all()

    def _due(self) -> bool:
        return self._flush or (bool(self._steps) and (self._waiting >= self.flush_rows or self._left() <= 0))

    def _left(self) -> float:
        """Seconds until the buffer's first row is old enough."""
        return self._since + self.flush_seconds - time.monotonic()

    def _write(self, steps: list[Arrived], samples: list[dict[str, Any]]) -> None:
        self._number += 1
        # steps last: a step that has its books has its scores
        for table, made in (
            ("samples", _samples_table(samples, self._id_type)),
            ("tokens", _tokens_table(steps, self.rank, self._id_type)),
            ("scores", _scores_table(steps, self.rank, self._id_type)),
            ("steps", _steps_table(steps, self.rank)),
        ):
            if made.num_rows:
                path = layout.part_path(self.folder, table, self.rank, self._number)
                layout.write_part(made.replace_schema_metadata(self._schema_metadata), path)

    # helpers

    def _running(self) -> bool:
        """Whether the ledger goes on; says once why not."""
        if self.error is None:
            return self._started
        text = f"the ledger in {self.folder} has stopped, what it holds stays readable: {self.error}"
        if self.on_error == "raise":
            raise OSError(text) from self.error
        if not self._warned:
            self._warned = True
            warn(f"{text}; training goes on without it", RuntimeWarning)
        return False

    def _look_up(self, ids: Sequence[Any], describe: Callable[[Any], Mapping[str, Any] | None]) -> None:
        for i in ids:
            if i not in self._described:
                found = clean_description(i, describe(i))
                self._described.add(i)
                with self._condition:
                    self._samples.append(found)

    def _last_booked(self, rank: int) -> int:
        """The number of the last part whose books are there."""
        return max((layout.rank_and_number(p)[1] for p in layout.parts(self.folder, "steps", rank)), default=0)

    def _cut_after(self, last: Sequence[int]) -> None:
        """Removes parts with larger numbers than each rank's, newest first, books before scores: a kill in between leaves a whole
        ledger.
        """
        numbers = {layout.rank_and_number(p) for p in self._parts(*layout.TABLES)}
        for rank, number in sorted(numbers, reverse=True):
            if number > _last_of(rank, last) or _last_of(rank, last) == 0:
                for table in ("steps", "scores", "tokens", "samples"):
                    layout.part_path(self.folder, table, rank, number).unlink(missing_ok=True)


def clean_description(sample: Hashable, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of ``samples`` from what a ``describe`` function returned.

    Raises:
        ValueError: it names something else than ``DESCRIPTION``.
        TypeError: the image is not bytes, or the tokens are not strings.
    """
    found = dict(found or {})
    if unknown := set(found) - set(DESCRIPTION):
        raise ValueError(f"describe({sample!r}) returned {', '.join(map(str, unknown))}; known: {', '.join(DESCRIPTION)}")
    row: dict[str, Any] = {"sample": sample}
    for name in ("group", "text", "path"):
        row[name] = None if found.get(name) is None else clean(str(found[name]))
    if row["text"]:
        row["text"] = row["text"][:_TEXT]
    image = found.get("image")
    if image is not None and not isinstance(image, (bytes, bytearray, memoryview)):
        raise TypeError(f"describe({sample!r}) must return image as bytes, got {type(image).__name__}")
    tokens = found.get("tokens")
    if tokens is not None and (isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens)):
        raise TypeError(f"describe({sample!r}) must return tokens as a list of strings, got {type(tokens).__name__}")
    row["tokens"] = None if tokens is None else [clean(token) for token in tokens]
    return {**row, "image": None if image is None else bytes(image)}


def _last_of(rank: int, last: Sequence[int]) -> int:
    """The rank's number among those of all; 0 for one that is new."""
    return last[rank] if rank < len(last) else 0


def _size(step: Arrived) -> int:
    return 0 if step.scores is None else step.scores.size + sum(scores.size for _, scores in step.tokens)


def _samples_table(rows: list[dict[str, Any]], ids: type | None) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=layout.samples_schema(layout.ID_TYPES[ids or str]))


def _scores_table(steps: list[Arrived], rank: int, ids: type | None) -> pa.Table:
    schema = layout.scores_schema(layout.ID_TYPES[ids or str])
    scored = [(s, s.scores) for s in steps if s.scores is not None]
    if not scored:
        return schema.empty_table()
    sizes = [x.size for _, x in scored]
    targets = scored[0][1].shape[1]
    names = [i for s, _ in scored for i in s.ids]
    if targets > 1:
        names = [i for i in names for _ in range(targets)]
    losses = [np.full(len(s.ids), np.nan) if s.losses is None else s.losses for s, _ in scored]
    loss = np.repeat(np.concatenate(losses).astype(np.float64), targets)
    epochs = [s.record.epoch for s, _ in scored]
    columns = [
        pa.array(np.repeat([s.record.step for s, _ in scored], sizes)),
        pa.array(np.repeat([e or 0 for e in epochs], sizes), mask=np.repeat([e is None for e in epochs], sizes)),
        pa.array(np.full(len(loss), rank, dtype=np.int32)),
        pa.array(names, schema.field("sample").type),
        pa.array(np.tile(np.arange(targets, dtype=np.int32), len(loss) // targets)),
        pa.array(np.concatenate([x.reshape(-1) for _, x in scored]).astype(np.float64)),
        pa.array(loss, mask=np.isnan(loss)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _tokens_table(steps: list[Arrived], rank: int, ids: type | None) -> pa.Table:
    rows = [
        {"step": s.record.step, "rank": rank, "sample": sample, "target": k, "scores": column}
        for s in steps
        for sample, scores in s.tokens
        for k, column in enumerate(scores.T)
    ]
    return pa.Table.from_pylist(rows, schema=layout.tokens_schema(layout.ID_TYPES[ids or str]))


def _steps_table(steps: list[Arrived], rank: int) -> pa.Table:
    rows = [{"rank": rank, **row} for step in steps for row in books.rows(step.record)]
    return pa.Table.from_pylist(rows, schema=layout.steps_schema())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform, "adam-ghost": __version__}
    for name in ("torch", "pyarrow", "transformers", "lightning", "accelerate", "peft"):
        if name in sys.modules:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "from a checkout"
    return found


def _rank() -> int:
    dist = sys.modules.get("torch.distributed")  # who has not loaded it has no ranks
    return dist.get_rank() if dist is not None and dist.is_available() and dist.is_initialized() else 0
