"""A step's numbers on their way from the device to the books, which wait for them; the device never does."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adam_ghost.ledger.books import Arrived, StepRecord
from adam_ghost.step.coverage import Coverage, Joined
from adam_ghost.step.fingerprint import EDITED


class Readback:
    """A tensor on its way to the host: copied without blocking, asked for when it has arrived."""

    def __init__(self, x: Tensor):
        self._event = None
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = x.detach().cpu()

    @property
    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def get(self) -> np.ndarray:
        """The values; waits for the copy if need be."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


@dataclass
class Pending:
    """A step's results on their way."""

    ids: Sequence[Hashable]
    record: StepRecord
    scores: Readback  # [n, K]
    numbers: Readback  # [5, K]: val_loss, total, history, 1 where the step is void, what the scores must add up to
    joined: Readback | None  # [4, K]: what ``step.join`` knows of all processes' scores; None: all are here
    edited: Readback  # bool, per gradient
    checked: bool  # whether it is known what the scores must add up to
    losses: Readback | None = None  # [n]
    at: float | None = None  # where val_loss was taken: 0 after history alone, 1 at the step's end; None: in another step
    tokens: Sequence["PendingTokens"] = ()


class PendingTokens(NamedTuple):
    """Scores of tokens of some samples on their way."""

    ids: Sequence[Hashable]  # of their micro-batch
    places: list[int]  # of the samples among these
    line: Readback  # [N, K]
    offsets: Readback  # [len(ids) + 1], into it

    def by_sample(self) -> list[tuple[Hashable, np.ndarray]]:
        """Each sample's ``[T, K]``."""
        line, offsets = self.line.get(), self.offsets.get()
        return [(self.ids[i], line[offsets[i] : offsets[i + 1]]) for i in self.places]


class Mark(NamedTuple):
    """A validation loss on the way of a run, within a step."""

    step: int
    at: float  # of the way from the weights after history alone to the step's end
    val_loss: list[float]
    total: list[float]  # what the batch took off on that way

    def since(self, last: "Mark") -> list[float]:
        """What history took off in this step, by the losses in this step and the one before: what the batches did not."""
        drop = np.subtract(last.val_loss, self.val_loss)
        return (drop - (1 - last.at) * np.array(last.total) - self.at * np.array(self.total)).tolist()


class Books:
    """Takes steps in their order, and gives each back when its numbers have arrived and were checked."""

    def __init__(self, coverage: Coverage):
        self.coverage = coverage
        self._last: Mark | None = None
        self._pending: list[Pending | Arrived] = []
        self._draining = False

    def add(self, step: Pending | Arrived) -> None:
        self._pending.append(step)

    def withdraw(self) -> None:
        """The step that was added last is not booked."""
        self._pending.pop()

    def drain(self, book: Callable[[Arrived], None], wait: bool = False) -> None:
        """Hands ``book`` the steps whose numbers have arrived; ``wait`` for all.

        Raises ValueError where a step's gradients turn out to have been edited.
        """
        if self._draining:  # a signal's handler, in the midst of booking: later steps must not come before this one
            return
        self._draining = True
        try:
            while self._pending:
                step = self._pending[0]
                if isinstance(step, Pending) and not (wait or step.numbers.ready):
                    return
                self._pending.pop(0)
                book(self._read(step) if isinstance(step, Pending) else step)
                if isinstance(step, Pending) and step.checked and not step.record.skipped:
                    accounted = step.numbers.get().astype(np.float64)[-1]
                    self.coverage.check(_joined(step), accounted, f"step {step.record.step}: ")
        finally:
            self._draining = False

    def _read(self, step: Pending) -> Arrived:
        record, scores = step.record, step.scores.get().astype(np.float64)
        val_loss, total, history, void, _ = step.numbers.get().astype(np.float64)
        record.skipped = bool(void.any())
        last, self._last = self._last, None
        if record.skipped:
            if last is not None:  # the weights are where they were
                self._last = last._replace(step=record.step)
            return Arrived(record)
        if step.edited.get().any():
            raise ValueError(EDITED)
        if not np.isfinite(scores).all():
            self.coverage.tell("not finite", f"step {record.step} is left out: its scores are not finite")
            record.skipped = True
            return Arrived(record)
        record.val_loss, record.total, record.history = val_loss.tolist(), total.tolist(), history.tolist()
        joined = _joined(step)
        self.coverage.check_alike(val_loss, joined, f"step {record.step}: ")
        record.score_sum, record.val_loss_at = joined.sum.tolist(), step.at
        if step.at is not None:
            self._last = Mark(record.step, step.at, record.val_loss, record.total)
            if last is not None and last.step == record.step - 1:
                record.history = self._last.since(last)
        losses = None if step.losses is None else step.losses.get()
        record.train_loss = None if losses is None else float(losses.sum())
        moments = None
        if step.joined is not None:
            mean = joined.sum / joined.samples
            moments = mean, np.sqrt(np.maximum(joined.squares / joined.samples - np.square(mean), 0.0))
        tokens = [sample for part in step.tokens for sample in part.by_sample()]
        record.tokens = len(tokens)
        return Arrived(record, step.ids, scores, losses, tokens, moments)

    def state_dict(self) -> tuple | None:
        return None if self._last is None else tuple(self._last)

    def load_state_dict(self, state: tuple | None) -> None:
        self._last = None if state is None else Mark(*state)


def _joined(step: Pending) -> Joined:
    if step.joined is None:
        return Joined.of(step.scores.get().astype(np.float64))
    samples, total, squares, val_loss = step.joined.get()
    return Joined(int(samples[0]), total, squares, val_loss)
