"""The writing side: takes steps from the training thread, writes parts on its own."""

import json
import platform
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from adam_ghost.ledger import layout
from adam_ghost.ledger.layout import pa, pq
from adam_ghost.ledger.lock import Lock

DESCRIPTION = ("group", "text", "path", "image")
_TEXT = 2000  # characters kept of a sample's text
_BEHIND = 4  # buffers that may wait for the disk before training does


class LedgerWriter:
    """Writes one run's ledger; pass it as ``InRun(..., ledger=LedgerWriter(DIR, ...))`` where ``ledger=DIR`` is not enough.

    Rows wait in a buffer, which a thread writes as one part when it is ``flush_rows`` long or ``flush_seconds`` old. A kill at
    any moment loses at most that buffer. Training waits for the disk only when four buffers do.

    Args:
        folder: of this run alone; created if missing. Ranks share it.
        flush_seconds, flush_rows: size of the buffer, in seconds since its first row and in rows of scores.
        on_error: what a full or failing disk does: ``warn`` once, stop the ledger and go on training, or ``raise`` in training.
        describe: called with an id when it first appears, on the training thread; returns a mapping with any of ``group``,
            ``text``, ``path`` (strings) and ``image`` (bytes of a PNG, JPEG, GIF or WebP), which tables and the report show.
            ``open_ledger(folder).describe(...)`` does the same after the run.
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
        describe: Callable[[Hashable], Mapping[str, Any] | None] | None = None,
        restart: bool = False,
        rank: int | None = None,
    ):
        if on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be warn or raise, got {on_error!r}")
        if not flush_seconds > 0 or flush_rows < 1:
            raise ValueError(f"flush_seconds and flush_rows must be positive, got {flush_seconds} and {flush_rows}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"ledger must be a folder, but {self.folder} is a file")
        self.flush_seconds, self.flush_rows, self.on_error = flush_seconds, flush_rows, on_error
        self.rank = _rank() if rank is None else rank
        self.run = uuid.uuid4().hex
        self.error: BaseException | None = None
        self._describe, self._described = describe, set()
        self._started = False
        self._warned = False
        self._lock = Lock(self.folder / f"r{self.rank}.lock")
        if restart:
            self._clear()
        self._schema_metadata: dict[bytes, bytes] = {}
        self._id_type: type | None = None
        self._steps: list[tuple] = []
        self._samples: list[dict] = []
        self._waiting = 0  # rows handed over and not yet written
        self._since = 0.0
        self._flush, self._stop = False, False
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None

    # what InRun calls

    def begin(self, ids: Sequence[Hashable], settings: Callable[[], Mapping[str, Any]]) -> None:
        """Called before a batch of ``ids``: refuses ids that cannot be written; at first, a folder that is not free for this run.

        Raises:
            TypeError: ids that are neither integers nor strings, or not of the kind they were.
            ValueError: the folder holds an earlier run's ledger.
        """
        self._check(ids)
        if self._started:
            return
        found = layout.parts(self.folder, "scores", self.rank) + layout.parts(self.folder, "steps", self.rank)
        if found:
            raise ValueError(
                f"{self.folder} holds the ledger of an earlier run: continue that one with load_state_dict() before the first"
                " batch, choose another folder, or throw it away with LedgerWriter(folder, restart=True)"
            )
        self._start(settings())

    def resume(self, run: str, step: int, settings: Mapping[str, Any]) -> None:
        """Continues run ``run`` after ``step``: whatever the ledger holds of later steps is cut off."""
        if self._started:
            raise RuntimeError("load_state_dict() comes before the first batch: this run's ledger has begun")
        for table in ("scores", "steps"):
            for part in layout.parts(self.folder, table, self.rank):
                self._cut(part, run, step)
        self.run = run
        self._start(settings)

    def add(
        self, record: Any, ids: Sequence[Hashable], scores: np.ndarray | None, losses: np.ndarray | None, epoch: int | None, cadence
    ) -> None:
        """Hands over one step: ``scores [n, K]`` (None where it was skipped), ``losses [n]`` or None. Returns at once.

        Raises:
            OSError: the disk failed, and ``on_error="raise"``.
        """
        if not self._running():
            return
        if scores is not None:
            self._look_up(ids)
        with self._condition:
            self._condition.wait_for(lambda: self._waiting < _BEHIND * self.flush_rows or self.error is not None)
            if not self._steps:
                self._since = time.monotonic()
            self._steps.append((record, ids, scores, losses, epoch, cadence, time.time()))
            before, self._waiting = self._waiting, self._waiting + (0 if scores is None else scores.size)
            if before < self.flush_rows <= self._waiting or len(self._steps) == 1:
                self._condition.notify_all()

    def flush(self) -> None:
        """Waits until everything handed over is on the disk."""
        with self._condition:
            if self._thread is None:
                return
            self._flush = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._flush or self.error is not None)
        self._running()

    def close(self) -> None:
        """Writes what waits, and lets go of the folder."""
        try:
            self.flush()
        finally:
            if self._thread is not None:
                with self._condition:
                    self._stop = True
                    self._condition.notify_all()
                self._thread.join()
                self._thread = None
            self._lock.release()

    # the thread's side

    def _start(self, settings: Mapping[str, Any]) -> None:
        described = {"format": layout.FORMAT, "run": self.run, "created": time.time(), "settings": dict(settings)}
        described["versions"] = _versions()
        self._schema_metadata = {layout.METADATA: json.dumps(described).encode()}
        if self.rank == 0:
            layout.write_json(described, self.folder / "run.json")
        numbers = [int(p.stem.split("-")[1]) for t in layout.TABLES for p in layout.parts(self.folder, t, self.rank)]
        self._number = max(numbers, default=0)
        for part in layout.parts(self.folder, "scores", self.rank)[:1]:
            self._id_type = int if pq.read_schema(part).field("sample").type == pa.int64() else str
        self._started = True
        self._thread = threading.Thread(target=self._work, name="adam_ghost ledger", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._due() and not self._stop:
                    self._condition.wait(self._patience())
                if self._stop and not self._steps:
                    return
                steps, self._steps = self._steps, []
                samples, self._samples = self._samples, []
            try:
                self._write(steps, samples)
            except Exception as error:
                with self._condition:
                    self.error, self._steps, self._samples = error, [], []
                    self._condition.notify_all()
                return
            with self._condition:
                self._waiting -= sum(s[2].size for s in steps if s[2] is not None)
                if not self._steps:
                    self._flush = False
                self._condition.notify_all()

    def _due(self) -> bool:
        if self._flush:
            return True
        return bool(self._steps) and (self._waiting >= self.flush_rows or self._patience() <= 0)

    def _patience(self) -> float | None:
        return max(0.0, self._since + self.flush_seconds - time.monotonic()) if self._steps else None

    def _write(self, steps: list[tuple], samples: list[dict]) -> None:
        if not steps and not samples:
            return
        self._number += 1
        name = f"r{self.rank}-{self._number:08d}.parquet"
        # steps last: a step that has its books has its scores
        for table, made in (
            ("samples", _samples_table(samples, self._id_type)),
            ("scores", _scores_table(steps, self.rank, self._id_type)),
            ("steps", _steps_table(steps, self.rank)),
        ):
            if made.num_rows:
                layout.write_part(made.replace_schema_metadata(self._schema_metadata), self.folder / table / name)

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
            warnings.warn(f"{text}; training goes on without it", RuntimeWarning, stacklevel=4)
        return False

    def _check(self, ids: Sequence[Hashable]) -> None:
        kinds = {int if isinstance(i, (int, np.integer)) else type(i) for i in ids}
        if self._id_type is None and len(kinds) == 1 and kinds <= set(layout.ID_TYPES):
            self._id_type = next(iter(kinds))
        if not kinds <= {self._id_type} or (kinds and self._id_type is None):
            wanted = "all integers or all strings" if self._id_type is None else f"{self._id_type.__name__}, as they were"
            raise TypeError(f"a ledger's ids must be {wanted}; got {', '.join(sorted(k.__name__ for k in kinds))}")

    def _look_up(self, ids: Sequence[Hashable]) -> None:
        if self._describe is None:
            return
        for i in ids:
            if i not in self._described:
                self._described.add(i)
                found = clean_description(i, self._describe(i))
                with self._condition:
                    self._samples.append(found)

    def _clear(self) -> None:
        for table in layout.TABLES:
            for part in layout.parts(self.folder, table, self.rank):
                part.unlink()

    def _cut(self, part: Path, run: str, step: int) -> None:
        owner = json.loads(pq.read_schema(part).metadata[layout.METADATA])["run"]
        if owner != run:
            raise ValueError(f"{self.folder} holds the ledger of run {owner}, but the checkpoint is of run {run}")
        table = pq.read_table(part, partitioning=None)
        kept = table.filter(pc.field("step") <= step)
        if kept.num_rows == 0:
            part.unlink()
        elif kept.num_rows < table.num_rows:
            layout.write_part(kept, part)


def clean_description(sample: Hashable, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """A row of ``samples`` from what a ``describe`` function returned."""
    found = dict(found or {})
    if unknown := set(found) - set(DESCRIPTION):
        raise ValueError(f"describe({sample!r}) returned {', '.join(map(str, unknown))}; known: {', '.join(DESCRIPTION)}")
    row = {name: None if found.get(name) is None else str(found[name]) for name in DESCRIPTION[:-1]}
    if row["text"]:
        # lone surrogates, as from file names, have no place in Parquet
        row["text"] = row["text"][:_TEXT].encode("utf-8", "replace").decode()
    return {"sample": sample, **row, "image": found.get("image")}


def _samples_table(rows: list[dict], ids: type | None) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=layout.samples_schema(layout.ID_TYPES[ids or str]))


def _scores_table(steps: list[tuple], rank: int, ids: type | None) -> pa.Table:
    schema = layout.scores_schema(layout.ID_TYPES[ids or str])
    steps = [s for s in steps if s[2] is not None]
    if not steps:
        return schema.empty_table()
    sizes = [s[2].size for s in steps]
    targets = steps[0][2].shape[1]
    names = [i for s in steps for i in s[1]]
    if targets > 1:
        names = [i for i in names for _ in range(targets)]
    sample = pa.array(names, schema.field("sample").type)
    losses = [np.full(len(s[1]), np.nan) if s[3] is None else s[3] for s in steps]
    loss = np.repeat(np.concatenate(losses).astype(np.float64), targets)
    epoch = np.repeat([-1 if s[4] is None else s[4] for s in steps], sizes).astype(np.int32)
    columns = [
        pa.array(np.repeat([s[0].step for s in steps], sizes)),
        pa.array(epoch, mask=epoch < 0),
        pa.array(np.full(len(loss), rank, dtype=np.int32)),
        sample,
        pa.array(np.tile(np.arange(targets, dtype=np.int32), len(loss) // targets)),
        pa.array(np.concatenate([s[2].reshape(-1) for s in steps]).astype(np.float64)),
        pa.array(loss, mask=np.isnan(loss)),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _steps_table(steps: list[tuple], rank: int) -> pa.Table:
    rows = [row for step in steps for row in _books(step, rank)]
    return pa.Table.from_pylist(rows, schema=layout.steps_schema())


def _books(step: tuple, rank: int) -> list[dict]:
    record, _, scores, losses, epoch, (every, refresh), now = step
    common = {"step": record.step, "epoch": epoch, "rank": rank, "samples": record.samples, "lr": record.lr, "time": now}
    common |= {"coverage": record.coverage, "skipped": record.skipped, "refreshed": record.refreshed, "seconds": record.seconds}
    common |= {"every": every, "refresh": refresh, "train_loss": None if losses is None else float(losses.sum())}
    if scores is None:
        return [{**common, "target": 0}]
    rows = []
    for k in range(scores.shape[1]):
        row = {"target": k, "val_loss": record.val_loss[k], "score_sum": record.score_sum[k], "total": record.total[k]}
        row["history"] = record.history[k]
        if record.audit is not None:
            row |= {"audit_r": record.audit.r, "audit_relative_l2": record.audit.relative_l2}
            row["audit_loss_drop"] = record.audit.loss_drop[k]
        rows.append(common | row)
    return rows


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in ("adam-ghost", "torch", "pyarrow", "transformers", "lightning", "accelerate", "peft"):
        if name.replace("-", "_") in sys.modules:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "from a checkout"
    return found


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
