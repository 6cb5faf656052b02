"""Scores added up per sample id while a run goes on."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from adam_ghost.ledger.ids import check_count

if TYPE_CHECKING:
    import pandas


class SampleScores(NamedTuple):
    """Per sample id, in the order of first appearance; arrays have a trailing ``[K]`` for K targets."""

    ids: list[Hashable]
    total: np.ndarray  # sum over steps, unit: validation loss, positive = helped
    standardized: np.ndarray  # mean over steps of (score - step's mean) / step's standard deviation: for finding bad samples
    steps: np.ndarray  # how many attributed steps the sample was part of

    def __repr__(self) -> str:
        """As long for a million samples as for one."""
        if not self.ids:
            return "SampleScores(no samples)"
        targets = f" and {self.total.shape[1]} targets" if self.total.ndim == 2 else ""
        best, worst = (self.top(1, harmful, 0, "standardized")[0] for harmful in (False, True))
        found = f"SampleScores({len(self.ids)} samples{targets}; standardized: {best[0]!r} {best[1]:+.3g}"
        return f"{found} to {worst[0]!r} {worst[1]:+.3g}; total, standardized, steps: arrays in the order of ids)"

    def top(self, k: int, harmful: bool, target: int, value: str) -> list[tuple[Hashable, float]]:
        """The ``k`` ids with the largest (or smallest) ``value``, ``total`` or ``standardized``, of one target.

        Raises ValueError where ``value`` or ``target`` is not there, or ``k`` is no positive integer.
        """
        if value not in ("standardized", "total"):
            raise ValueError(f"value must be standardized or total, got {value!r}")
        if not self.ids:
            return []
        values = getattr(self, value)
        values = values if values.ndim == 2 else values[:, None]
        if not 0 <= target < values.shape[1]:
            raise ValueError(f"target must be below {values.shape[1]}, the number of validation losses, got {target}")
        check_count(k)
        order = np.argsort(values[:, target] if harmful else -values[:, target], kind="stable")[:k]
        return [(self.ids[i], float(values[i, target])) for i in order]

    def sorted(self, value: str = "standardized", target: int = 0) -> "SampleScores":
        """The same, the most helpful sample by ``value`` of one target first; equal ones keep their order.

        Raises ValueError where ``value`` or ``target`` is not there.
        """
        place = {i: k for k, i in enumerate(self.ids)}
        order = np.array([place[i] for i, _ in self.top(len(self.ids), False, target, value)], dtype=np.int64)
        return SampleScores([self.ids[k] for k in order], self.total[order], self.standardized[order], self.steps[order])

    def to_pandas(self) -> "pandas.DataFrame":
        """A table, the most helpful sample first: ``sample``, ``standardized``, ``total``, ``steps``.

        Where there are ``K`` targets, the values of each have columns of their own, ``total_0`` and so on; the first sorts.
        """
        import pandas

        found = self.sorted()
        columns: dict[str, Any] = {"sample": found.ids}
        for name in ("standardized", "total"):
            values = getattr(found, name)
            if values.ndim == 1:
                columns[name] = values
            else:
                columns |= {f"{name}_{k}": values[:, k] for k in range(values.shape[1])}
        return pandas.DataFrame(columns | {"steps": found.steps})


class Totals:
    """Running sums per sample id for ``K`` targets, float64."""

    def __init__(self):
        self._rows: dict[Hashable, int] = {}
        self._sums = np.zeros((0, 2, 0))  # [ids, (score, standardized), K]
        self._steps = np.zeros(0, dtype=np.int64)

    def add(self, ids: Sequence[Hashable], scores: np.ndarray, moments: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Adds one step's ``scores [n, K]``, standardised by ``moments``, or their own mean and standard deviation.

        A sample that occurs twice in a step gets both shares, and counts twice.
        """
        if not len(ids):
            return
        rows = np.array([self._rows.setdefault(i, len(self._rows)) for i in ids])
        if len(self._rows) > len(self._steps):
            capacity = max(64, 2 * len(self._rows))
            grown = np.zeros((capacity, 2, scores.shape[1]))
            if len(self._steps):
                grown[: len(self._sums)] = self._sums
            self._sums = grown
            self._steps = np.concatenate([self._steps, np.zeros(capacity - len(self._steps), dtype=np.int64)])
        mean, spread = (scores.mean(0), scores.std(0)) if moments is None else moments
        z = np.divide(scores - mean, spread, out=np.zeros_like(scores), where=spread > 0)
        np.add.at(self._sums, rows, np.stack([scores, z], 1))
        np.add.at(self._steps, rows, 1)

    def read(self, squeeze: bool) -> SampleScores:
        n = len(self._rows)
        steps = self._steps[:n].copy()
        sums = self._sums[:n].copy()
        if squeeze:
            sums = sums[..., 0] if n else sums.reshape(0, 2)
        return SampleScores(list(self._rows), sums[:, 0], (sums[:, 1].T / np.maximum(steps, 1)).T, steps)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, which ``torch.load(weights_only=True)`` takes."""
        n = len(self._rows)
        sums, steps = (torch.from_numpy(x[:n].copy()) for x in (self._sums, self._steps))
        return {"ids": list(self._rows), "sums": sums, "steps": steps}

    @staticmethod
    def join(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The states of several processes' totals as one, a sample that several have had added up."""
        if len(states) == 1:
            return states[0]
        rows: dict[Hashable, int] = {}
        places = [torch.tensor([rows.setdefault(i, len(rows)) for i in state["ids"]], dtype=torch.int64) for state in states]
        like = max((state["sums"] for state in states), key=lambda x: x.shape[-1])
        sums, steps = like.new_zeros(len(rows), 2, like.shape[-1]), torch.zeros(len(rows), dtype=torch.int64)
        for state, place in zip(states, places, strict=True):
            if len(place):
                sums.index_add_(0, place, state["sums"])
                steps.index_add_(0, place, state["steps"])
        return {"ids": list(rows), "sums": sums, "steps": steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {i: k for k, i in enumerate(state["ids"])}
        self._sums, self._steps = (state[name].cpu().numpy().copy() for name in ("sums", "steps"))
