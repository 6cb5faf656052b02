"""What a ledger can hold of a sample's name: integers of 64 bits, or valid Unicode."""

from collections.abc import Sequence
from typing import Any

_LOW, _HIGH = -(2**63), 2**63


def check_ids(ids: Sequence[Any], kind: type | None) -> type | None:
    """The kind of ``ids``, ``int`` or ``str``, which has to be ``kind``, if that is known; None, if neither says.

    Raises:
        TypeError: other ids than integers and strings, or of another kind than before.
        ValueError: an integer beyond 64 bits, a string that is not valid Unicode.
    """
    kinds = set(map(type, ids))
    if kind is None and (kinds == {int} or kinds == {str}):
        kind = next(iter(kinds))
    if not kinds <= {kind}:
        wanted = "all integers or all strings" if kind is None else f"{kind.__name__}, as they were"
        raise TypeError(f"a ledger's ids must be {wanted}; got {', '.join(sorted(k.__name__ for k in kinds))}")
    if kinds == {int}:
        for i in (min(ids), max(ids)):
            if not _LOW <= i < _HIGH:
                raise ValueError(f"a ledger's ids must fit into 64 bits with a sign, got {i}: pass str(id)")
    if kinds == {str}:
        for i in ids:
            if not i.isascii() and i != clean(i):
                raise ValueError(f"a ledger's ids must be valid Unicode, got {i!r}: pass os.fsencode(id).hex(), or a number")
    return kind


def clean(text: str) -> str:
    r"""``text`` without lone surrogates, as undecodable file names have, which Parquet cannot hold: ``\udcff`` is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()
