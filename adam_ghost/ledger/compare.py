"""Two ledgers beside each other: two seeds, two schedules, two validation losses."""

from typing import Any, NamedTuple

import numpy as np

from adam_ghost.ledger.layout import pa
from adam_ghost.ledger.reader import LedgerReader

import pyarrow.compute as pc  # isort: skip  (after layout, which says what to install where pyarrow is missing)


class Comparison(NamedTuple):
    """Of the samples that both ledgers have; ``a`` and ``b`` are values, places count from 1, the most helpful."""

    both: int
    only_a: int
    only_b: int
    rank_correlation: float  # Spearman's; NaN where fewer than two samples, or equal values
    movers: list[dict[str, Any]]  # sample, a, b, place_a, place_b, and what the first ledger says of the sample
    groups: list[dict[str, Any]]  # group, a, b: over all samples of each ledger; empty where no group was described
    values: np.ndarray  # [both, 2]


def compare(a: LedgerReader, b: LedgerReader, *, k: int = 10, target: int = 0, value: str = "standardized") -> Comparison:
    """How alike two ledgers rank their samples, and the ``k`` that changed places most.

    Raises ValueError where one ledger's ids are integers and the other's strings, or one has no such ``target`` or ``value``.
    """
    first, second = (ledger.totals(target=target, value=value) for ledger in (a, b))
    if first.num_rows and second.num_rows and first["sample"].type != second["sample"].type:
        kinds = ("integers" if t["sample"].type == pa.int64() else "strings" for t in (first, second))
        raise ValueError("samples cannot be matched: ids are {} in the first ledger, {} in the second".format(*kinds))
    there = first.filter(pc.is_in(first["sample"], second["sample"].combine_chunks())).sort_by("sample")
    place = pc.index_in(there["sample"], second["sample"].combine_chunks())
    values = np.stack([there["value"].to_numpy(), second["value"].take(place).to_numpy()], 1)  # [both, 2]
    places = np.stack([ranks(-values[:, j]) for j in (0, 1)], 1)
    order = np.argsort(-np.abs(places[:, 0] - places[:, 1]), kind="stable")[:k]
    names = there["sample"].take(order).to_pylist()
    said = a.described(names)
    movers = []
    for i, sample in zip(order.tolist(), names, strict=True):
        found = {"sample": sample, "a": values[i, 0], "b": values[i, 1], "place_a": places[i, 0], "place_b": places[i, 1]}
        movers.append(found | {name: said.get(sample, {}).get(name) for name in ("group", "text", "path")})
    only = first.num_rows - len(values), second.num_rows - len(values)
    return Comparison(len(values), *only, _correlation(places), movers, _groups(a, b, target, value), values)


def ranks(x: np.ndarray) -> np.ndarray:
    """Places from 1, the smallest first; equal values share the mean of theirs. ``[n]``, float64."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _correlation(places: np.ndarray) -> float:
    if len(places) < 2 or (places.std(0) == 0).any():
        return float("nan")
    return float(np.corrcoef(places.T)[0, 1])


def _groups(a: LedgerReader, b: LedgerReader, target: int, value: str) -> list[dict[str, Any]]:
    x, y = ({r["group"]: r["value"] for r in t.groups(target=target, value=value, bootstrap=0).to_pylist()} for t in (a, b))
    names = sorted(x.keys() | y.keys())
    return [{"group": name, "a": x.get(name), "b": y.get(name)} for name in names] if set(names) - {"(none)"} else []
