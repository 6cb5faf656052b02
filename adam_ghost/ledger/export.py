"""A ledger's tables for spreadsheets."""

import re
import stat
from pathlib import Path
from typing import BinaryIO

from adam_ghost.ledger import layout
from adam_ghost.ledger.formulas import BEGINNINGS
from adam_ghost.ledger.layout import pa

import pyarrow.compute as pc  # isort: skip  (after layout, which says what to install where pyarrow is missing)
import pyarrow.csv  # isort: skip

_FORMULA = f"^([{re.escape(BEGINNINGS)}])"


def write_csv(table: pa.Table, to: Path | BinaryIO, *, raw: bool = False) -> None:
    """Writes ``table`` as CSV. Texts that a spreadsheet would run get an apostrophe before them, unless ``raw``.

    Raises:
        ValueError: ``to`` is a link, or no plain file.
    """
    if not raw:
        table = neutral(table)
    if isinstance(to, Path):
        refuse_links(to)
        layout.replace(to, lambda file: pyarrow.csv.write_csv(table, file))
    else:
        pyarrow.csv.write_csv(table, to)


def neutral(table: pa.Table) -> pa.Table:
    for i, field in enumerate(table.schema):
        if field.type == pa.string():
            table = table.set_column(i, field, pc.replace_substring_regex(table.column(i), _FORMULA, r"'\1"))
    return table


def refuse_links(path: Path) -> None:
    """Raises ValueError where writing ``path`` would replace what somebody put there for another purpose."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link, which is not followed: remove it, or name the file that it points to")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a plain file")
