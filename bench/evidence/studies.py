"""The questions that the evidence answers: what is measured for each, as cells that can be taken one by one, and what they say."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench.evidence import choosing, horizons, one_step, rivals, scoring, sources, speed, whole_run
from bench.statistics import interval

Summary = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One measurement: ``measure(**options)`` returns plain values."""

    measure: Callable[..., dict[str, Any]]
    options: dict[str, Any]
    alone: bool = False  # times something: nothing else may run beside it

    @property
    def name(self) -> str:
        """Tells it from all others, also as a file's name."""
        said = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.measure.__module__.rsplit('.', 1)[-1]}-{self.measure.__name__}-{said}"


@dataclass(frozen=True)
class Study:
    """``cells(quick)`` are measured, and ``summary`` tells what all of them say, from pairs of cell and result."""

    name: str
    cells: Callable[[bool], list[Cell]]
    summary: Callable[[list[tuple[Cell, dict[str, Any]]]], Summary]


Results = list[tuple[Cell, dict[str, Any]]]
SEEDS = range(5)


# one step

BASE = {"batch": 16, "lr": 1e-3, "beta2": 0.999}
CHANGES: list[dict[str, Any]] = [
    {}, {"batch": 8}, {"batch": 64}, {"batch": 128}, {"beta2": 0.95}, {"beta2": 0.99}, {"lr": 1e-4}, {"lr": 1e-2}, {"clip": 0.5},
    {"decay": 0.1}, {"dropout": 0.1},
]  # fmt: skip


def _one_step_cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(one_step.measure, {"task": "digits", "seed": 0, **BASE, "steps": (2, 10)})]
    return [
        Cell(one_step.measure, {"task": task, "seed": seed, **BASE, **change})
        for task in ("digits", "digits, CNN", "texts")
        for change in CHANGES
        for seed in SEEDS[:2]
        if task == "texts" or "dropout" not in change
    ]


def _one_step_summary(results: Results) -> Summary:
    """Over trainings and steps from the tenth on; step 2 by itself, where Adam's step is nearly the gradient's sign."""

    def spread(pairs: list[list[float]]) -> Summary:
        r, error = zip(*pairs, strict=True)
        high = sum(x >= 0.999 for x in r) / len(r)
        return {"r": median(r), "r_worst": min(r), "r_high": high, "error": median(error), "error_worst": max(error)}

    out: Summary = {}
    for label, chosen in (("from step 10", lambda step: step >= 10), ("step 2", lambda step: step == 2)):
        rows = [row for _, found in results for row in found["rows"] if chosen(row["step"])]
        out[label] = {
            truth: {m: spread([row["against"][truth][m] for row in rows]) for m in one_step.METHODS} for truth in one_step.TRUTHS
        }
        out[label]["yardstick"] = median(row["yardstick"] for row in rows)
    for cell, found in results:
        rows = [row["against"]["true step"] for row in found["rows"] if row["step"] >= 10]
        change = {k: v for k, v in cell.options.items() if k not in ("task", "seed", "steps") and BASE.get(k) != v}
        key = f"{cell.options['task']}: " + (", ".join(f"{k} {v}" for k, v in change.items()) or "the base")
        settings = out.setdefault("settings", {}).setdefault(key, {m: [] for m in one_step.METHODS})
        for m in one_step.METHODS:
            settings[m] += [row[m] for row in rows]
    out["settings"] = {key: {m: spread(pairs) for m, pairs in row.items()} for key, row in out["settings"].items()}
    out["by step"] = {
        str(step): {m: median(r["against"]["true step"][m][0] for r in rows) for m in one_step.METHODS}
        for step in sorted({row["step"] for _, found in results for row in found["rows"]})
        if (rows := [row for _, found in results for row in found["rows"] if row["step"] == step])
    }
    return out


# steps later

RATES = [(1e-3, 0.999), (3e-3, 0.999), (1e-2, 0.999), (3e-4, 0.95), (1e-2, 0.95)]


def _horizon_cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(horizons.measure, {"task": "digits", "seed": 0, "lr": 1e-3, "beta2": 0.999})]
    return [
        Cell(horizons.measure, {"task": task, "seed": seed, "lr": lr, "beta2": beta2})
        for task in ("digits", "digits, CNN", "texts")
        for lr, beta2 in (RATES if task != "digits, CNN" else RATES[:2])
        for seed in SEEDS[:2]
    ]


def _horizon_summary(results: Results) -> Summary:
    out: Summary = {}
    for cell, found in results:
        o = cell.options
        row = out.setdefault(f"{o['task']}, lr {o['lr']:g}, beta2 {o['beta2']:g}", {})
        for K, ways in found["rows"].items():
            for way, pairs in ways.items():
                row.setdefault(way, {}).setdefault(K, []).extend(r for r, _ in pairs)
    return {
        key: {way: {K: {"r": median(r), "r_worst": min(r)} for K, r in of.items()} for way, of in row.items()}
        for key, row in out.items()
    }


# the run


def _run_cells(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(whole_run.measure, {"task": "digits", "seed": 0, "windows": [scoring.DEFAULT], "others": False})]
    return [
        Cell(whole_run.measure, {"task": task, "seed": seed, "windows": list(scoring.WINDOWS)})
        for task in whole_run.RATES
        for seed in SEEDS
    ]


def _query_cells(quick: bool) -> list[Cell]:
    return [] if quick else [Cell(whole_run.measure_queries, {"seed": seed}) for seed in SEEDS]


def _target_cells(quick: bool) -> list[Cell]:
    return (
        [] if quick else [Cell(whole_run.measure_targets, {"seed": seed, "sizes": list(whole_run.TARGETS)}) for seed in SEEDS[:3]]
    )


def compared(rows: list[dict[str, dict[str, float]]], to: str | None) -> Summary:
    """Per way and measure: mean and interval over seeds, and of the paired differences ``to`` less the way."""
    out: Summary = {}
    for way in rows[0]:
        of = [row for row in rows if way in row]
        for measure in of[0][way]:
            values = [row[way][measure] for row in of]
            cell = out.setdefault(way, {}).setdefault(measure, {})
            cell["mean"], cell["half"] = interval(values)
            if to in rows[0] and way != to:
                cell["behind"], cell["behind_half"] = interval([row[to][measure] - row[way][measure] for row in of])
    return out


def _by_task(results: Results) -> dict[str, Results]:
    out: dict[str, Results] = {}
    for cell, found in results:
        out.setdefault(cell.options.get("task", "texts"), []).append((cell, found))
    return out


def _run_summary(results: Results) -> Summary:
    return {task: compared([f["rows"] for _, f in of], scoring.DEFAULT) for task, of in _by_task(results).items()}


def _query_summary(results: Results) -> Summary:
    return compared([f["rows"] for _, f in results], whole_run.AS_ONE) if results else {}


def _target_summary(results: Results) -> Summary:
    return compared([f["rows"] for _, f in results], None) if results else {}


# what scores are for


def _kept_cells(quick: bool) -> list[Cell]:
    tasks = ["digits"] if quick else list(choosing.RATES)
    return [Cell(choosing.measure_kept, {"task": task, "seed": seed}) for task in tasks for seed in SEEDS[: 1 if quick else None]]


def _step_cells(quick: bool) -> list[Cell]:
    return [] if quick else [Cell(choosing.measure_steps_of, {"task": t, "seed": seed}) for t in choosing.RATES for seed in SEEDS]


def _domain_cells(quick: bool) -> list[Cell]:
    return [] if quick else [Cell(choosing.measure_domains, {"seed": seed}) for seed in SEEDS]


def _source_cells(quick: bool) -> list[Cell]:
    return [] if quick else [Cell(sources.measure, {"seed": seed}) for seed in SEEDS]


def _listed(results: Results, keys: tuple[str, ...], to: str) -> Summary:
    """Rows of a list, told apart by ``keys``, the first of which is the way."""
    tables = []
    for _, found in results:
        tables.append(
            {
                " | ".join(str(row[k]) for k in keys): {k: v for k, v in row.items() if k not in keys and isinstance(v, float)}
                for row in found["rows"]
            }
        )
    return compared(tables, to)


def _kept_summary(results: Results) -> Summary:
    return {task: _listed(of, ("way", "kept"), f"{choosing.EVERYTHING} | 1.0") for task, of in _by_task(results).items()}


def _step_summary(results: Results) -> Summary:
    return {task: _listed(of, ("way",), choosing.RANDOM) for task, of in _by_task(results).items()}


def _domain_summary(results: Results) -> Summary:
    return _listed(results, ("way",), "uniform") if results else {}


def _source_summary(results: Results) -> Summary:
    return _listed(results, ("way", "kind"), "") if results else {}


# speed


def _speed_cells(quick: bool) -> list[Cell]:
    if quick:
        tiny = speed.Setting(layers=1, width=32, tokens=16, samples=4)
        return [Cell(speed.measure, {"setting": asdict(tiny), "variants": [*speed.OURS, *rivals.RIVALS], "seconds": 0.0}, True)]
    every = [*speed.OURS, *rivals.RIVALS]
    times = [Cell(speed.measure, {"setting": asdict(s), "variants": every, "seconds": 60.0}, True) for s in speed.SETTINGS.values()]
    memory = [
        Cell(speed.measure_memory, {"setting": asdict(speed.SETTINGS["r = 1/16"]), "variant": v}, True)
        for v in ("plain", "lookahead", "midpoint", *filter(rivals.installed, rivals.RIVALS))
    ]
    growth = sorted({tuple(speed.grown(name, x).items()) for name, values in speed.GROWTH.items() for x in values})
    two = ["lookahead", "midpoint"]
    grown = [Cell(speed.measure, {"setting": dict(s), "variants": two, "seconds": 12.0}, True) for s in growth]
    return times + memory + grown


def _way_cells(quick: bool) -> list[Cell]:
    sizes = {"steps": 4, "layers": 1, "width": 32, "rounds": 1} if quick else {"steps": 64, "layers": 2, "width": 128, "rounds": 2}
    return [Cell(speed.measure_ways, sizes, True)]


def _way_summary(results: Results) -> Summary:
    return results[0][1]


def _speed_summary(results: Results) -> Summary:
    out: Summary = {"settings": {}, "peak_bytes": {}, "growth": {}}
    names = {tuple(asdict(s).items()): name for name, s in speed.SETTINGS.items()}
    for cell, found in results:
        setting = cell.options["setting"]
        if cell.measure is speed.measure_memory:
            out["peak_bytes"][cell.options["variant"]] = found["peak_bytes"]
        elif set(rivals.RIVALS) & set(cell.options["variants"]):
            out["settings"][names.get(tuple(setting.items()), "tiny")] = found["rows"]
        else:
            shares = {v: round(row["of_bound"], 3) for v, row in found["rows"].items() if v in speed.OURS}
            out["growth"][" ".join(f"{k}={v}" for k, v in setting.items())] = shares
    return out


STUDIES = [
    Study("one step", _one_step_cells, _one_step_summary),
    Study("steps later", _horizon_cells, _horizon_summary),
    Study("the run", _run_cells, _run_summary),
    Study("queries", _query_cells, _query_summary),
    Study("targets", _target_cells, _target_summary),
    Study("kept", _kept_cells, _kept_summary),
    Study("chosen in the step", _step_cells, _step_summary),
    Study("domains", _domain_cells, _domain_summary),
    Study("sources", _source_cells, _source_summary),
    Study("cost of ways", _way_cells, _way_summary),
    Study("speed", _speed_cells, _speed_summary),
]
