"""What a sample may be called: a 64-bit integer or a string, and nothing that merely resembles one."""

from collections.abc import Iterable
from typing import Any

import numpy as np

_LOW, _HIGH = -(2**63), 2**63


def read_ids(ids: Any) -> list[int] | list[str]:
    """The ids of a batch as Python's integers or strings.

    Args:
        ids: a list, tensor or array ``[n]``, or a list of 0-d tensors; all integers, or all strings.

    Raises:
        TypeError: booleans, floats or anything else that is neither, or both kinds.
        ValueError: not one dimension, an integer beyond 64 bits, a string that is not valid Unicode.
    """
    shape = getattr(ids, "shape", None)
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable) or shape == ():
        raise TypeError(f"ids must be a list or a tensor with one id per sample, got {_named(ids)}")
    if shape is not None and len(shape) != 1:
        raise ValueError(f"ids must have one dimension, [n], got {list(shape)}")
    listed = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    kinds = set(map(type, listed))
    if not kinds <= {int} and not kinds <= {str}:
        listed = [_plain(i) for i in listed]
        kinds = set(map(type, listed))
    if len(kinds) > 1:
        raise TypeError("ids must be all integers or all strings, got both")
    if kinds == {int}:
        for i in (min(listed), max(listed)):
            if not _LOW <= i < _HIGH:
                raise ValueError(f"ids must fit into 64 bits with a sign, got {i}: pass str(id)")
    for i in listed if kinds == {str} else ():
        if not i.isascii() and i != clean(i):
            raise ValueError(f"ids must be valid Unicode, got {i!r}: pass os.fsencode(id).hex(), or a number")
    return listed


def clean(text: str) -> str:
    r"""``text`` without lone surrogates, as undecodable file names have, which Parquet cannot hold: ``\udcff`` is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(i: Any) -> int | str:
    """One id, out of NumPy's or a 0-d tensor's wrapping."""
    value = i.item() if getattr(i, "shape", None) == () and hasattr(i, "item") else i
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"ids must be all integers or all strings, got {_named(i)}")


def _named(x: Any) -> str:
    dtype = getattr(x, "dtype", None)
    kind = type(x).__name__ if dtype is None else f"{type(x).__name__} of {dtype}, {list(x.shape)}"
    return f"{kind} ({str(x)[:40]})"
