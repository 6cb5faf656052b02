"""What a ledger's folder holds.

    run.json                      the run's id, settings and versions
    scores/r<rank>-<number>.parquet    one row per step, sample and target
    steps/r<rank>-<number>.parquet     one row per step and target: the books
    samples/r<rank>-<number>.parquet   what a sample is: group, text, path, image; only where somebody described them
    r<rank>.lock                  held by the process that writes

A part appears under its name by one rename, when it is complete. Parts are never changed, except that resuming a run cuts off
what came after its checkpoint, again by one rename. So whatever matches ``*.parquet`` is whole at any moment, and nothing is
in two parts.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError("a ledger needs pyarrow and duckdb: pip install 'adam-ghost[ledger]'") from error

FORMAT = 1
TABLES = ("scores", "steps", "samples")
METADATA = b"adam_ghost"  # key of the run's settings in every part's schema
ID_TYPES = {int: pa.int64(), str: pa.string()}


def scores_schema(ids: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("epoch", pa.int32()),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("sample", ids, nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("loss", pa.float64()),  # the sample's share of the training loss, where the loop told it
        ]
    )


def steps_schema() -> pa.Schema:
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("epoch", pa.int32()),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("samples", pa.int32(), nullable=False),
            pa.field("lr", pa.list_(pa.float64())),  # per parameter group
            pa.field("train_loss", pa.float64()),
            pa.field("val_loss", pa.float64()),
            pa.field("score_sum", pa.float64()),
            pa.field("total", pa.float64()),  # < P , g(B) >
            pa.field("history", pa.float64()),
            pa.field("coverage", pa.float64()),
            pa.field("skipped", pa.bool_(), nullable=False),
            pa.field("refreshed", pa.bool_(), nullable=False),
            pa.field("every", pa.int32()),
            pa.field("refresh", pa.int32()),
            pa.field("seconds", pa.float64()),  # of attribution
            pa.field("time", pa.float64()),  # of booking, seconds since 1970
            pa.field("audit_r", pa.float64()),
            pa.field("audit_relative_l2", pa.float64()),
            pa.field("audit_loss_drop", pa.float64()),
        ]
    )


def samples_schema(ids: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("sample", ids, nullable=False),
            pa.field("group", pa.string()),
            pa.field("text", pa.string()),
            pa.field("path", pa.string()),
            pa.field("image", pa.binary()),
        ]
    )


def parts(folder: Path, table: str, rank: int | None = None) -> list[Path]:
    """A table's complete parts, in the order of writing."""
    return sorted((folder / table).glob("r*-*.parquet" if rank is None else f"r{rank}-*.parquet"))


def write_part(table: pa.Table, path: Path) -> None:
    """Writes ``path`` whole or not at all, also if the machine loses its power."""
    replace(path, lambda made: pq.write_table(table, made, compression="zstd", compression_level=1, use_dictionary=["sample"]))


def write_json(value: Any, path: Path) -> None:
    replace(path, lambda made: made.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # no reader's pattern matches a name that begins with a dot
    try:
        write(made)
        with made.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
