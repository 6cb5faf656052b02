"""Sample ids on their way through somebody else's loader: a column of the data set that the model must not see."""

from collections.abc import Mapping, MutableMapping
from typing import Any

from adam_ghost.ledger.books import StepRecord

ID = "sample_id"


def has_ids(batch: Any, column: str) -> bool:
    return isinstance(batch, MutableMapping) and column in batch


def take_ids(batch: Any, column: str = ID, cure: str = "") -> Any:
    """Takes the ids out of ``batch`` and returns them, as ``run.batch`` takes them; ``cure`` ends the message where there are none.

    Raises:
        KeyError: the batch has no such column.
    """
    if not has_ids(batch, column):
        there = f"it has {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"it is a {type(batch).__name__}"
        raise KeyError(f"the batch has no column {column!r} with the samples' ids, {there}{cure}")
    return batch.pop(column)


def logged(record: StepRecord) -> dict[str, float]:
    """The numbers of a step that go to the loggers, summed over targets: how far scores miss the gradient among them."""
    found = {f"attribution/{name}": sum(getattr(record, name)) for name in ("score_sum", "total", "val_loss")}
    gap = sum(abs(a - b) for a, b in zip(record.score_sum, record.total, strict=True))
    return found | {"attribution/gap": gap, "attribution/coverage": record.coverage}
