"""The records of a run's newest steps; a ledger has them all."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, overload

from adam_ghost.ledger.books import Audit, StepRecord

KEPT = 4096


class Steps(Sequence[StepRecord]):
    """The newest ``KEPT`` records, oldest first. ``booked``: how many there have been."""

    def __init__(self) -> None:
        self._records: deque[StepRecord] = deque(maxlen=KEPT)
        self.booked = 0

    def append(self, record: StepRecord) -> None:
        self._records.append(record)
        self.booked += 1

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(self._records)

    @overload
    def __getitem__(self, i: int) -> StepRecord: ...
    @overload
    def __getitem__(self, i: slice) -> list[StepRecord]: ...
    def __getitem__(self, i: int | slice) -> StepRecord | list[StepRecord]:
        return list(self._records)[i] if isinstance(i, slice) else self._records[i]

    def __repr__(self) -> str:
        return f"<{self.booked} steps, {len(self)} kept>"

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which ``torch.load(weights_only=True)`` takes."""
        kept = [{**vars(s), "audit": None if s.audit is None else vars(s.audit)} for s in self._records]
        return {"booked": self.booked, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._records.clear()
        for s in state["kept"]:
            self._records.append(StepRecord(**{**s, "audit": None if s["audit"] is None else Audit(**s["audit"])}))
        self.booked = state["booked"]
