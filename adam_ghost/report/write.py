"""Puts the page together: aggregates from the ledger, plotly's script, and nothing that the page would have to fetch.

Texts from data are never part of the markup: they travel as JSON whose ``<``, ``>`` and ``&`` are escaped, and the page's script
sets them as text. A content security policy admits only the page's own scripts, by their hashes, and no network.
"""

import base64
import hashlib
import html
import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from adam_ghost.extras import how_to_install
from adam_ghost.ledger import layout
from adam_ghost.ledger.export import refuse_links
from adam_ghost.ledger.gap import find_gap
from adam_ghost.ledger.layout import pa
from adam_ghost.ledger.reader import VALUES, LedgerReader, open_ledger
from adam_ghost.report.balance import balance, in_words

import pyarrow.compute as pc  # isort: skip  (after layout, which says what to install where pyarrow is missing)

_TABLE = 1000  # samples at either end in the page's table
_EXTREMES = 10
_GROUPS = 12  # curves
_POINTS = 400  # of a curve over steps
# an Okabe-Ito palette: told apart with the common forms of colour blindness, on light and on dark
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
_COMPLETENESS = (
    "What the validation loss lost, and who took it off.",
    "The distance from the first curve to the second is history: what momentum and weight decay did without the batch."
    " Where successive steps measured the loss, history is booked from it as what the scores do not explain, so that the sum"
    " meets the drop by its making; whether the scores are right is for the audit to say.",
)
_IMAGES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def write_report(
    ledger: "LedgerReader | str | Path",
    out: str | Path,
    *,
    value: str = "standardized",
    target: int = 0,
    title: str | None = None,
) -> Path:
    """Writes the page of a ledger to ``out`` and returns that path.

    Args:
        ledger: or its folder.
        out: a plain file, or none yet; a symbolic link is not followed.
        value: by which samples are ranked, as in ``LedgerReader``.
        target: which of the validation losses, where there are several.
        title: of the page.

    Raises:
        FileNotFoundError: there is no ledger.
        ValueError: the ledger holds no scores for ``target``; ``out`` is a link.
    """
    if not isinstance(ledger, LedgerReader):
        with open_ledger(ledger) as opened:
            return write_report(opened, out, value=value, target=target, title=title)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, got {value!r}")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(f"adam_ghost: the report needs plotly: {how_to_install('report')}") from error
    out = Path(out)
    refuse_links(out)
    data, facts = _collect(ledger, target, value)
    page = _page(title or "Data attribution report", facts, data, get_plotlyjs()).encode()
    layout.replace(out, lambda file: file.write(page))
    return out


def _collect(ledger: LedgerReader, target: int, rank_by: str) -> tuple[dict[str, Any], dict[str, str]]:
    totals = ledger.totals(target=target)
    if not totals.num_rows:
        raise ValueError(f"the ledger in {ledger.folder} holds no scores for target {target} yet")
    z = ledger.totals(target=target, value="standardized")
    value = totals["value"].to_numpy()
    order = np.argsort(-(value if rank_by == "total" else _aligned(z, totals)), kind="stable")
    chosen = order if len(order) <= 2 * _TABLE else np.concatenate([order[:_TABLE], order[-_TABLE:]])
    names = totals["sample"].take(chosen).to_pylist()
    standardized = _lookup(z, names)
    described = _lookup(ledger.samples(), names)
    counts = totals["n"].to_numpy()
    samples = []
    for place, name in zip(chosen.tolist(), names, strict=True):
        row = described.get(name, {})
        made = {"sample": name, "value": float(value[place]), "n": int(counts[place]), "standardized": standardized[name]["value"]}
        samples.append(made | {k: row.get(k) for k in ("group", "text", "path")} | {"image": None})
    k = min(_EXTREMES, len(samples))
    helpful, harmful = list(range(k)), list(range(len(samples) - 1, len(samples) - 1 - k, -1))
    for i in {*helpful, *harmful}:
        samples[i]["image"] = _image(described.get(names[i], {}).get("image"))
    steps = ledger.sql(
        """SELECT step, avg(score_sum) AS score_sum, avg(history) AS history, avg(val_loss) AS val_loss,
           bool_or(skipped) AS skipped, min(val_loss_at) AS val_loss_at, max(horizon) AS horizon,
           max(seconds) AS seconds, min(time) AS time, sum(samples) AS samples, max(audit_r) AS r, max(audit_relative_l2) AS l2,
           max(audit_loss_drop) AS loss_drop, min(coverage) AS coverage,
           max(by_passes) AS by_passes FROM steps WHERE target = ? GROUP BY step ORDER BY step""",
        [target],
    ).to_pylist()
    booked = [s for s in steps if not s["skipped"]]
    groups = ledger.groups(target=target).to_pylist()
    windows = any(s["horizon"] is not None for s in booked)
    data = {
        "windows": windows,
        "rank": "value" if rank_by == "total" else "standardized",
        "samples": samples,
        "helpful": helpful,
        "harmful": harmful,
        "groups": groups,
        "audits": [{k: s[k] for k in ("step", "r", "l2", "score_sum", "loss_drop")} for s in steps if s["r"] is not None],
        "charts": _charts(ledger, target, booked, groups, value),
        "balance": in_words(booked, *(ledger.run.get("settings", {}).get(k) or 1 for k in ("every", "refresh"))),
    }
    facts = _facts(ledger, steps, booked, totals.num_rows)
    if windows:  # booked a window at a time, which tells no pace
        del data["charts"]["throughput"], facts["Attribution per step"]
    return _finite(data), facts | {"Completeness": find_gap(ledger, target).line}


def _charts(ledger: LedgerReader, target: int, steps: list[dict], groups: list[dict], value: np.ndarray) -> dict[str, Any]:
    binned = ledger.by_step(target=target).to_pylist()
    x = sorted({row["step"] for row in binned})
    largest = sorted(groups, key=lambda g: -abs(g["value"]))[:_GROUPS]
    curves = []
    for i, group in enumerate(largest):
        at = {row["step"]: row["value"] for row in binned if row["group"] == group["group"]}
        y = np.cumsum([at.get(step, 0.0) for step in x]).tolist()
        # told apart without colour too
        dash = ("solid", "dash", "dot", "dashdot")[i % 4]
        line = {"color": _COLOURS[i % len(_COLOURS)], "dash": dash}
        # plotly reads some markup in names
        curves.append({"type": "scatter", "mode": "lines", "name": html.escape(str(group["group"])), "x": x, "y": y, "line": line})
    low, high = np.quantile(value, [0.005, 0.995])
    heights, edges = np.histogram(value[(value >= low) & (value <= high)], bins=60)
    middle = ((edges[1:] + edges[:-1]) / 2).tolist()
    rates = []
    width = max(1, len(steps) // 100)
    for a, b in zip(steps[::width], steps[width::width], strict=False):
        if b["time"] > a["time"]:
            rates.append((b["step"], (b["step"] - a["step"]) / (b["time"] - a["time"])))
    unit = "validation loss"
    lines = _balance_lines(steps)
    completeness = {"data": lines, "layout": _layout("step", f"taken off since the start ({unit})")}
    return {
        "over-steps": {"data": curves, "layout": _layout("step", f"cumulative score ({unit})")},
        "distribution": {
            "data": [{"type": "bar", "x": middle, "y": heights.tolist(), "marker": {"color": _COLOURS[0]}, "name": "samples"}],
            "layout": _layout(f"sum of a sample's scores ({unit})", "samples") | {"bargap": 0.05},
        },
        **({"completeness": completeness} if lines else {}),
        "throughput": {
            "data": [
                {"type": "scatter", "mode": "lines", "x": [r[0] for r in rates], "y": [r[1] for r in rates], "name": "steps/s"}
            ],
            "layout": _layout("step", "steps per second"),
        },
    }


def _balance_lines(steps: list[dict]) -> list[dict[str, Any]]:
    """Curves; none where the samples' part is not apart from history's."""
    found = balance(steps)
    if found is None or len(found.step) < 2:
        return []
    kept = np.unique(np.linspace(0, len(found.step) - 1, min(len(found.step), _POINTS)).round().astype(int))
    lines = {"samples' own steps": found.own, "with history": found.own + found.history, "measured drop": found.drop}
    return [
        {"type": "scatter", "mode": "lines", "name": name, "x": found.step[kept].tolist(), "y": y[kept].tolist()}
        | {"line": {"color": colour, "dash": dash}}
        for (name, y), colour, dash in zip(lines.items(), _COLOURS, ("solid", "dash", "dot"), strict=False)
    ]


def _layout(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _facts(ledger: LedgerReader, steps: list[dict], booked: list[dict], samples: int) -> dict[str, str]:
    run = ledger.run
    settings = run.get("settings", {})
    passed = max((s["by_passes"] for s in steps), default=0.0)
    facts = {
        "Model": settings.get("model"),
        "Parameters": f"{settings['parameters']:,}" if "parameters" in settings else None,
        "Optimizer": settings.get("optimizer"),
        "Schedule": settings.get("schedule"),
        "Rule": settings.get("rule"),
        "Attributed steps": f"{len(booked):,}",
        "Skipped steps": str(len(steps) - len(booked)),
        "Samples": f"{samples:,}",
        "Parameters covered": f"{min(s['coverage'] for s in steps):.1%}" if steps else None,
        "Parameters scored by whole passes": f"{passed:.1%}" if passed else None,
        "Attribution per step": f"{1e3 * float(np.median([s['seconds'] for s in booked])):.1f} ms" if booked else None,
        "Began": f"{datetime.fromtimestamp(run['created'], timezone.utc):%Y-%m-%d %H:%M} UTC",
        "PyTorch": run.get("versions", {}).get("torch"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _aligned(table: pa.Table, like: pa.Table) -> np.ndarray:
    """The values of ``table`` in the order of the samples of ``like``."""
    return table["value"].take(pc.index_in(like["sample"], table["sample"].combine_chunks())).to_numpy()


def _lookup(table: Any, names: list) -> dict[Any, dict]:
    wanted = table.filter(pc.is_in(table["sample"], pa.array(names, table["sample"].type)))
    return {row["sample"]: row for row in wanted.to_pylist()}


def _image(found: bytes | None) -> str | None:
    if found is None:
        return None
    kind = next((k for magic, k in _IMAGES.items() if found.startswith(magic)), None)
    return kind and f"data:image/{kind};base64,{base64.b64encode(found).decode()}"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _page(title: str, facts: dict[str, str], data: dict[str, Any], plotly: str) -> str:
    here = Path(__file__).parent
    css, script = (here / "page.css").read_text(encoding="utf-8"), (here / "page.js").read_text(encoding="utf-8")
    packed = json.dumps(data, allow_nan=False)
    for c in "<>&\u2028\u2029":
        packed = packed.replace(c, f"\\u{ord(c):04x}")
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (plotly, script))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    title = html.escape(title)
    listed = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    audited = (
        "Steps whose scores were held against their exact Shapley values; the batch's own drop is what its gradient took off the"
        " validation loss, against the step that momentum and weight decay would have taken without it."
    )
    if data["windows"]:
        audited = "Steps of which samples were left out, to train on to their window's end: what that did, against their credit."
    if not data["audits"]:
        audited = "No step was audited; InRun(..., audit_every=N) does."
    rate = '<p class="note">Windows are booked when they are swept: the books do not tell the pace.</p>'
    if not data["windows"]:
        rate = _figure("throughput", "Optimizer steps per second, attribution included.", "Steps that are audited take longer.")
    best = html.escape(str(max(data["groups"], key=lambda g: g["value"])["group"]))
    ends = f"{best} ends highest." if len(data["groups"]) > 1 else "All samples are in one group."
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,"><title>{title}</title><style>{css}</style></head><body>
<a class="skip" href="#samples">Skip to the samples</a>
<header><h1>{title}</h1><p class="note">What each training sample did to the validation loss while the model trained.
Positive = it took something off that loss; the unit is the loss's own.</p></header>
<main>
<section aria-labelledby="h-run"><h2 id="h-run">The run</h2><dl>{listed}</dl></section>
<section aria-labelledby="h-groups"><h2 id="h-groups">Groups</h2>
{_figure("over-steps", f"Cumulative score by group over steps. {ends}", "The table below has the final values.")}
<div class="scroll" id="group-table" tabindex="0" role="region" aria-label="Groups"></div></section>
<section aria-labelledby="h-most"><h2 id="h-most">Most helpful</h2>
<div class="scroll" id="helpful" tabindex="0" role="region" aria-label="Most helpful samples"></div>
<h2>Most harmful</h2><div class="scroll" id="harmful" tabindex="0" role="region" aria-label="Most harmful samples"></div></section>
<section aria-labelledby="h-spread"><h2 id="h-spread">Distribution of scores</h2>
{_figure("distribution", "Samples by the sum of their scores.", "The half per cent at either end is left out.")}</section>
<section aria-labelledby="h-sum"><h2 id="h-sum">Completeness</h2>
<p class="note">{html.escape(data["balance"])}</p>
{_figure("completeness", *_COMPLETENESS) if "completeness" in data["charts"] else ""}</section>
<section aria-labelledby="h-audit"><h2 id="h-audit">Audit</h2><p class="note">{audited}</p>
<div class="scroll" id="audit-table" tabindex="0" role="region" aria-label="Audits"></div></section>
<section aria-labelledby="h-rate"><h2 id="h-rate">Throughput</h2>
{rate}</section>
<section aria-labelledby="samples"><h2 id="samples">Samples</h2>
<p class="note">Up to {_TABLE} samples at either end; the ledger has all of them.</p>
<div class="controls"><label>Search<input id="search" type="search" autocomplete="off"></label>
<label>Group<select id="group"><option value="">all</option></select></label>
<p id="count" role="status" aria-live="polite"></p></div>
<div class="scroll" id="table" tabindex="0" role="region" aria-label="Table of samples"></div></section>
</main>
<script type="application/json" id="data">{packed}</script><script>{plotly}</script><script>{script}</script></body></html>
"""


def _figure(name: str, what: str, more: str) -> str:
    chart = f'<div class="chart" id="{name}" role="img" aria-label="{what}"></div>'
    return f"<figure>{chart}<figcaption>{what} {more}</figcaption></figure>"
