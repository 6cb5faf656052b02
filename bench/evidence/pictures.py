"""Small SVGs of the evidence, by matplotlib where it is installed."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from bench.evidence import choosing, one_step, scoring

Json = dict[str, Any]


class Picture(NamedTuple):
    studies: tuple[str, ...]  # whose summaries it shows; it stands in the section of the last
    caption: str
    draw: Callable[..., None]  # on matplotlib's axes, from these summaries
    height: float = 3.6  # inches


def _fidelity(axes: Any, s: Json) -> None:
    steps = [int(k) for k in s["by step"]]
    for m in one_step.METHODS:
        axes.plot(steps, [s["by step"][str(k)][m] for k in steps], marker="o", label=m)
    axes.set(xscale="log", xlabel="step", ylabel="R with the true step's Shapley values", ylim=(None, 1.02))


def _horizons(axes: Any, s: Json) -> None:
    for way in next(iter(s.values())):
        for k, (key, row) in enumerate(s.items()):
            if "lr 0.001" in key:
                horizons = [int(K.split("=")[1]) for K in row[way]]
                style = {"linestyle": "-" if way == "window" else "--", "marker": "o", "color": f"C{k}"}
                axes.plot(horizons, [x["r"] for x in row[way].values()], label=f"{key.split(', lr')[0]}: {way}", **style)
    axes.set(xscale="log", xlabel="K, steps until the loss is measured", ylabel="R with leaving out and training on")


def _runs(axes: Any, s: Json) -> None:
    ways = list(next(iter(s.values())))
    for k, (task, of) in enumerate(s.items()):
        y, thick = [i + 0.26 * k for i in range(len(ways))], {"linewidth": 0.8}
        axes.barh(
            y, [of[w]["LDS"]["mean"] for w in ways], 0.26, xerr=[of[w]["LDS"]["half"] for w in ways], label=task, error_kw=thick
        )
    axes.set(yticks=[i + 0.26 for i in range(len(ways))], yticklabels=ways, xlabel="LDS")
    axes.invert_yaxis()


def frontier(runs: Json, cost: Json) -> dict[str, tuple[float, float]]:
    """Per way: share of plain training's speed, and LDS, mean over tasks."""
    of_plain = cost["of_plain"]
    ways = [w for w in of_plain if all(w in of for of in runs.values())]
    return {w: (of_plain[w], fmean(of[w]["LDS"]["mean"] for of in runs.values())) for w in ways}


def _frontier(axes: Any, runs: Json, cost: Json) -> None:
    points = frontier(runs, cost)
    best, on_it = -1.0, set()
    for way, (_, y) in sorted(points.items(), key=lambda point: (-point[1][0], -point[1][1])):
        if y > best:  # nothing faster is as good
            best = y
            on_it.add(way)
    label = 1.05 * max(y for _, y in points.values())
    for way, (x, y) in sorted(points.items(), key=lambda point: -point[1][1]):
        ours, color = way in scoring.WINDOWS or way in scoring.ONE_STEP, "C0" if way in on_it else "C7"
        axes.plot(x, y, "o" if ours else "s", color=color, mfc=None if ours else "none", zorder=3)
        label = min(label - 0.055, y + 0.02)  # names stand in a column, one under the other
        axes.plot([x, 1.08, 1.12], [y, label, label], color="#cccccc", linewidth=0.6, zorder=1)
        axes.text(1.13, label, way, fontsize=7, color="black" if way in on_it else "grey", verticalalignment="center")
    axes.set(
        xlabel="share of plain training's speed", ylabel="LDS, mean over tasks", xlim=(0, 1.75), xticks=[0, 0.25, 0.5, 0.75, 1]
    )


def _kept(axes: Any, s: Json) -> None:
    ways = s["digits"]
    for n in dict.fromkeys(key.split(" | ")[0] for key in ways):
        if n != choosing.EVERYTHING:
            axes.plot(choosing.KEPT, [ways[f"{n} | {share}"]["accuracy"]["mean"] for share in choosing.KEPT], marker="o", label=n)
    axes.axhline(ways[f"{choosing.EVERYTHING} | 1.0"]["accuracy"]["mean"], color="grey", linestyle=":", label=choosing.EVERYTHING)
    axes.set(xlabel="share of the digits that is kept", ylabel="accuracy after training again")
    axes.invert_xaxis()


PICTURES = {
    "frontier": Picture(
        ("the run", "cost of ways"),
        "What scores are worth, and what they cost: LDS of all samples' scores against the speed that training keeps. Circles: this"
        " package's schedules; squares: others. Grey: something is faster and better",
        _frontier,
        4.2,
    ),
    "steps": Picture(("one step",), "How right one step's scores are, by step", _fidelity),
    "horizons": Picture(("steps later",), "How right scores are K steps later", _horizons),
    "runs": Picture(("the run",), f"LDS of every way to score a run; the default: {scoring.DEFAULT}", _runs, 6.4),
    "kept": Picture(("kept",), "Accuracy after training again on the best digits", _kept),
}


def draw(found: Json, folder: Path) -> list[str]:
    """Writes ``evidence-NAME.svg`` for what was measured; returns the names, none without matplotlib."""
    if not find_spec("matplotlib"):
        return []
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    drawn = []
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "evidence",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(style):
        for name, picture in PICTURES.items():
            if all(summaries := [found["studies"].get(study) for study in picture.studies]):
                figure, axes = pyplot.subplots(figsize=(6.4, picture.height), layout="constrained")
                picture.draw(axes, *summaries)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(frameon=False, fontsize=7)
                path = folder / f"evidence-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                path.write_text(re.sub(r"\d+\.\d{2,}", lambda x: f"{float(x[0]):.1f}", path.read_text()))  # of a point
                pyplot.close(figure)
                drawn.append(name)
    return drawn
