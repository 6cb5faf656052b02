"""What names a sample: an integer, a string or a tuple of these; a ledger holds integers of 64 bits, or valid Unicode."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

Id = int | str | tuple

_LOW, _HIGH = -(2**63), 2**63


def check_count(k: Any) -> None:
    """Raises ValueError where ``k`` is not how many samples are asked for."""
    if not isinstance(k, (int, np.integer)) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")


def normalise(ids: Any) -> list[Id]:
    """The ids of a batch as Python's integers, strings or tuples of these, one per sample.

    Args:
        ids: a list, or a tensor or array ``[n]`` or ``[n, 1]`` of integers; a list may hold NumPy's scalars and 0-d tensors.

    Raises:
        TypeError: not a list, or an id is a boolean, a float or anything else; named.
        ValueError: a tensor or array of another shape.
    """
    if isinstance(ids, (str, bytes, Mapping, Set)) or not isinstance(ids, Iterable) or getattr(ids, "shape", None) == ():
        raise TypeError(f"ids must be a list or a tensor of one id per sample, got {_named(ids)}")
    shape: tuple[int, ...] = getattr(ids, "shape", (0,))
    if len(shape) != 1 and (len(shape) != 2 or shape[1] != 1):
        raise ValueError(f"ids must be one per sample, [n], got a {type(ids).__name__} {list(shape)}")
    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if len(shape) == 2:
        listed = [row[0] for row in listed]
    return listed if set(map(type, listed)) <= {int, str} else [_plain(i) for i in listed]


def _plain(i: Any) -> Id:
    """One id out of NumPy's or a 0-d tensor's wrapping."""
    value = i.item() if getattr(i, "shape", None) == () and hasattr(i, "item") else i
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple):
        return tuple(_plain(x) for x in value)
    raise TypeError(f"an id must be an integer, a string or a tuple of these, got {_named(i)}")


def _named(x: Any) -> str:
    return f"{type(x).__name__} {str(x)[:40]}"


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
