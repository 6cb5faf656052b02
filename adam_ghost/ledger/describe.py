"""Says what samples are when their run is over."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adam_ghost.ledger import layout
from adam_ghost.ledger.layout import pa
from adam_ghost.ledger.lock import Lock
from adam_ghost.ledger.reader import open_ledger
from adam_ghost.ledger.writer import clean_description


def describe_samples(folder: str | Path, what: Mapping[Any, Any] | Callable[[Any], Mapping[str, Any] | None]) -> None:
    """Says what the samples of a ledger are, replacing what was said before.

    Args:
        folder: of the ledger.
        what: id -> any of ``group``, ``text``, ``path``, ``image``, ``tokens``, as ``LedgerWriter(describe=...)`` returns them.

    Raises:
        FileNotFoundError: there is no ledger.
        Locked: the run is still writing.
    """
    with open_ledger(folder) as ledger:
        ids = ledger.sql("SELECT DISTINCT sample FROM scores ORDER BY sample")["sample"]
        run = ledger.run
    say = what if callable(what) else what.get
    rows = [clean_description(i, say(i)) for i in ids.to_pylist()]
    folder = Path(folder).absolute()
    lock = Lock(folder / "r0.lock")
    try:
        schema = layout.samples_schema(ids.type).with_metadata({layout.METADATA: json.dumps(run).encode()})
        made = layout.part_path(folder, "samples", 0, 0)
        layout.write_part(pa.Table.from_pylist(rows, schema=schema), made)
        for part in layout.parts(folder, "samples"):
            if part != made:
                part.unlink()
    finally:
        lock.release()
