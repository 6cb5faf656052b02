"""What a ledger's folder holds.

    run.json                      the run's id, settings and versions, and whether a checkpoint of it was made
    scores/r<rank>-<number>.parquet    one row per step, sample and target
    steps/r<rank>-<number>.parquet     one row per step and target: the books
    tokens/r<rank>-<number>.parquet    one row per step, sample and target: the scores of the sample's tokens; where asked for
    samples/r<rank>-<number>.parquet   what a sample is: group, text, path, image, tokens; only where somebody described them
    r<rank>.lock                  held by the process that writes

A part appears under its name by one rename, when it is complete, samples first and steps last. Parts are never changed;
resuming a run removes those that came after its checkpoint. So whatever matches ``*.parquet`` is whole at any moment, and
nothing is in two parts. A rank's numbers run from 1 without a gap (0: descriptions given afterwards). Each part
carries its run's id and a checksum of all its bytes.
"""

import io
import json
import os
import re
import secrets
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from adam_ghost.extras import how_to_install
from adam_ghost.ledger import books

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ImportError(f"adam_ghost: a ledger needs pyarrow and duckdb: {how_to_install('ledger')}") from error

FORMAT = 2
TABLES = ("scores", "tokens", "steps", "samples")
METADATA = b"adam_ghost"  # key of the run's settings in every part's schema
ID_TYPES = {int: pa.int64(), str: pa.string()}
# of a record's fields; a value per target is a column of numbers, since each target has a row
COLUMN_TYPES = {
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    list[float]: pa.list_(pa.float64()),
    books.PerTarget: pa.float64(),
}
_CHECKSUM = b"adam_ghost crc32"
_UNKNOWN = b"--------"  # stands for the checksum while it is taken
_NAME = re.compile(r"r(\d+)-(\d{8})\.parquet")


def scores_schema(ids: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("epoch", pa.int64()),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("sample", ids, nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("score", pa.float64(), nullable=False),
            pa.field("loss", pa.float64()),  # the sample's share of the training loss, where the loop told it
        ]
    )


def steps_schema() -> pa.Schema:
    """The fields of ``books.StepRecord``, and whose row it is."""
    whose = [pa.field("rank", pa.int32(), nullable=False), pa.field("target", pa.int32(), nullable=False)]
    booked = []
    for column in books.columns():
        may_lack = column.optional or column.type == books.PerTarget  # a skipped step has no values per target
        booked.append(pa.field(column.name, COLUMN_TYPES[column.type], nullable=may_lack))
    return pa.schema(whose + booked)


def tokens_schema(ids: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            pa.field("step", pa.int64(), nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field("sample", ids, nullable=False),
            pa.field("target", pa.int32(), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),  # in the order of the batch's row
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
            pa.field("tokens", pa.list_(pa.string())),  # what its tokens say, in the order of its row
        ]
    )


def part_path(folder: Path, table: str, rank: int, number: int) -> Path:
    return folder / table / f"r{rank}-{number:08d}.parquet"


def parts(folder: Path, table: str, rank: int | None = None) -> list[Path]:
    """A table's complete parts, in the order of writing."""
    there = folder / table
    # the name is compared, not a pattern: a folder's name may hold a pattern's characters
    names = sorted(p.name for p in there.iterdir()) if there.is_dir() else []
    found = [m for name in names if (m := _NAME.fullmatch(name))]
    return [there / m[0] for m in found if rank is None or int(m[1]) == rank]


def foreign_parts(folder: Path, table: str) -> list[Path]:
    """What other tools would read as a part, and no run of ours has written."""
    there = folder / table
    found = there.iterdir() if there.is_dir() else ()
    return sorted(p for p in found if p.suffix == ".parquet" and p.name[0] != "." and not _NAME.fullmatch(p.name))


def rank_and_number(part: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(part.name)
    assert found is not None
    return int(found[1]), int(found[2])


def write_part(table: pa.Table, path: Path) -> None:
    """Writes ``path`` whole or not at all, also if the machine loses its power; ``table`` has its run in its metadata."""
    made = io.BytesIO()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _CHECKSUM: _UNKNOWN})
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["sample"]}
    pq.write_table(table, made, write_page_checksum=True, **options)
    content = bytearray(made.getvalue())
    at = _checksum_place(content)
    content[at : at + 8] = b"%08x" % zlib.crc32(content)
    replace(path, lambda file: file.write(content))


def is_intact(part: Path) -> bool:
    """Whether a part holds the bytes that were written."""
    content = bytearray(part.read_bytes())
    try:
        at = _checksum_place(content)
    except ValueError:
        return False
    said = bytes(content[at : at + 8])
    content[at : at + 8] = _UNKNOWN
    return said == b"%08x" % zlib.crc32(content)


def _checksum_place(content: bytearray) -> int:
    """Where the checksum stands in a part's footer: Thrift's compact protocol puts a key, then the value's type and size."""
    key = _CHECKSUM + b"\x18\x08"
    return content.rindex(key) + len(key)


def settings_of(part: Path) -> dict[str, Any]:
    """The run's id, settings and versions, as a part carries them; empty, if no run has written it."""
    written = (pq.read_schema(part).metadata or {}).get(METADATA)
    return {} if written is None else json.loads(written)


def write_json(value: Any, path: Path) -> None:
    replace(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def was_checkpointed(folder: Path) -> bool:
    """Whether a checkpoint may say where the run in ``folder`` goes on; only a readable ``run.json`` says that none was made."""
    try:
        return bool(json.loads((folder / "run.json").read_text(encoding="utf-8"))["checkpointed"])
    except (OSError, ValueError, KeyError, TypeError):
        return True


def replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Puts a file that ``write`` fills at ``path``, by one rename; a link that is there is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # no reader's pattern matches a name that begins with a dot, and nobody can have put a link under a name they cannot foresee
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with made.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path, rank: int) -> None:
    """Removes what a kill left half written; called by the rank's only writer."""
    for table in TABLES:
        there = folder / table
        for path in list(there.iterdir()) if there.is_dir() else ():
            if path.name.startswith(f".r{rank}-") and path.name.endswith(".tmp"):
                path.unlink()
