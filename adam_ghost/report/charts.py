"""The page's charts as data: series of points, of which the page's script draws lines, bars or dots."""

from typing import Any

import numpy as np

from adam_ghost.report.balance import balance

_GROUPS = 8  # curves
_POINTS = 200  # of a curve over steps
_BINS = 60
_UNIT = "validation loss"


def draw(steps: list[dict], groups: list[dict], binned: Any, totals: np.ndarray) -> dict[str, Any]:
    """The charts of one target by their names on the page; those that there is nothing for are left out.

    Args:
        steps: those that were booked.
        groups: with their ``value``; empty, or ``binned`` has their scores as ``LedgerReader.by_step`` sums them.
        totals: the samples' sums of scores, ``[samples]``.
    """
    found = {"spread": _spread(totals), "balance": _balance(steps), "pace": _pace(steps)}
    if groups:
        found["groups"] = _by_group(groups, binned)
    return {name: made for name, made in found.items() if made is not None}


def chart(kind: str, x: str, y: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    """``kind``: lines, bars or dots; ``series``: ``name``, ``x``, ``y``."""
    return {"kind": kind, "x": x, "y": y, "series": series}


def spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` places, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def _by_group(groups: list[dict], binned: Any) -> dict[str, Any]:
    steps, place = np.unique(binned["step"].to_numpy(), return_inverse=True)
    kept = spread(len(steps), _POINTS)
    names, values = np.array(binned["group"].to_pylist(), dtype=object), binned["value"].to_numpy()
    series = []
    for group in sorted(groups, key=lambda g: -abs(g["value"]))[:_GROUPS]:
        own = names == group["group"]
        sums = np.cumsum(np.bincount(place[own], values[own], len(steps)))
        series.append({"name": group["group"], "x": steps[kept].tolist(), "y": sums[kept].tolist()})
    return chart("lines", "step", f"running sum of scores ({_UNIT})", series)


def _spread(totals: np.ndarray) -> dict[str, Any]:
    low, high = np.quantile(totals, [0.005, 0.995])
    heights, edges = np.histogram(totals[(totals >= low) & (totals <= high)], bins=_BINS)
    series = {"name": "samples", "x": ((edges[1:] + edges[:-1]) / 2).tolist(), "y": heights.tolist()}
    return chart("bars", f"sum of a sample's scores ({_UNIT})", "samples", [series])


def _balance(steps: list[dict]) -> dict[str, Any] | None:
    """None where the samples' part is not apart from history's."""
    found = balance(steps)
    if found is None or len(found.step) < 2 or any(s["horizon"] is not None for s in steps):
        return None
    kept = spread(len(found.step), _POINTS)
    lines = {"samples' own steps": found.own, "with momentum and decay": found.own + found.history, "measured drop": found.drop}
    series = [{"name": name, "x": found.step[kept].tolist(), "y": y[kept].tolist()} for name, y in lines.items()]
    return chart("lines", "step", f"taken off since the start ({_UNIT})", series)


def _pace(steps: list[dict]) -> dict[str, Any] | None:
    """Steps per second; None of windows, which are booked when they are swept."""
    if any(s["horizon"] is not None for s in steps):
        return None
    width = max(1, len(steps) // 100)
    rates = []
    for a, b in zip(steps[::width], steps[width::width], strict=False):
        if b["time"] > a["time"]:
            rates.append((b["step"], (b["step"] - a["step"]) / (b["time"] - a["time"])))
    if len(rates) < 2:
        return None
    x, y = ([r[i] for r in rates] for i in (0, 1))
    return chart("lines", "step", "steps per second", [{"name": "steps per second", "x": x, "y": y}])
