"""Sample ids on their way through somebody else's loader: a column of the data set that the model must not see."""

from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any

ID = "sample_id"


def take_ids(batch: Any, column: str = ID) -> list[Hashable]:
    """Takes the ids out of ``batch`` and returns them.

    Raises:
        KeyError: the batch has no such column.
    """
    if not isinstance(batch, MutableMapping) or column not in batch:
        there = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise KeyError(f"the batch has no column {column!r} with the samples' ids; it has {there}")
    ids = batch.pop(column)
    return ids.tolist() if hasattr(ids, "tolist") else list(ids)
