"""What the page shows of a ledger, as plain data: the ends of the ranking with their noise, groups, charts, what is explained."""

import base64
import math
from collections.abc import Hashable, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from adam_ghost.ledger.audits import find_audits
from adam_ghost.ledger.gap import find_gap
from adam_ghost.ledger.reader import BLOCKS, LedgerReader
from adam_ghost.ledger.resampling import middle, resample
from adam_ghost.report import charts
from adam_ghost.report.against import set_against
from adam_ghost.report.balance import balance, in_words
from adam_ghost.report.headline import headline, how_many

_TABLE = 1000  # samples at either end in the page's table, of all targets together
_LEAST = 100  # of one target
_DRAWS = 200  # resamplings of the steps
_CURVES = 40  # samples at either end whose scores can be followed over steps
_POINTS = 48  # of such a curve
# room on the page, in bytes; what comes nearer to an end of the ranking comes first
_TEXTS, _IMAGES = 450_000, 400_000
_COLOURED = 40  # samples of a target whose tokens are shown
_TOKENS = 30_000  # tokens that these may have, of all targets together
_CUT = 60  # characters left of a text for which there is no room
_KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def gather(ledger: LedgerReader, value: str, against: LedgerReader | None) -> dict[str, Any]:
    """The page's data; samples are ranked by ``value``, and every target of the ledger has its own part.

    Raises ValueError where the ledger holds no scores.
    """
    targets = ledger.targets
    count = max(_LEAST, _TABLE // max(1, len(targets)))
    found = [_target(ledger, target, value, count, against) for target in targets]
    if not any(part["ids"] for part in found):
        raise ValueError(f"the ledger in {ledger.folder} holds no scores yet")
    place: dict[Hashable, int] = {}
    coloured = {row["sample"] for part in found for row in part["tokens"]}
    for ids in _from_the_ends([part["ids"] for part in found]) + [row["sample"] for part in found for row in part["tokens"]]:
        place.setdefault(ids, len(place))
    for part in found:
        part["rows"]["sample"] = [place[i] for i in part.pop("ids")]
        part["tokens"] = [row | {"sample": place[row["sample"]]} for row in part["tokens"]]
    return _short(
        {"rank": value, "samples": _describe(ledger, list(place), coloured), "targets": found, "facts": _facts(ledger, found)}
    )


def _target(ledger: LedgerReader, target: int, value: str, count: int, against: LedgerReader | None) -> dict[str, Any]:
    everything = ledger.values(target=target)
    columns = {name: everything[name].to_numpy() for name in ("total", "standardized", "n")}
    order = np.argsort(-columns[value], kind="stable")
    chosen = order if len(order) <= 2 * count else np.concatenate([order[:count], order[-count:]])
    ids = everything["sample"].take(chosen).to_pylist()
    scores = ledger.scores_of(ids, target=target)
    draws = ledger.draws(scores, len(ids), target=target, bootstrap=_DRAWS)
    rows: dict[str, list] = {name: column[chosen].tolist() for name, column in columns.items()}
    for name, drawn in draws.items():
        for end, found in zip(("low", "high"), middle(drawn), strict=True):
            # what was met once has no noise that could be seen
            rows[f"{name}_{end}"] = np.where(columns["n"][chosen] > 1, found, np.nan).tolist()
    steps = _steps(ledger, target)
    booked = [s for s in steps if not s["skipped"]]
    groups, binned = _groups(ledger, target, everything["sample"])
    bottom = how_many(len(order), count)
    harm = float(columns["total"][chosen[len(chosen) - bottom :]].sum())
    low, high = middle(draws["total"][:, len(chosen) - bottom :].sum(1, keepdims=True))
    audits = find_audits(ledger, target)
    loss = f"validation loss {target}" if len(ledger.targets) > 1 else "the validation loss"
    return {
        "target": target,
        "ids": ids,
        "rows": rows,
        "curves": _curves(scores, len(ids)),
        "headline": headline(len(order), bottom, harm, (low.item(), high.item()), value, booked, loss, audits),
        "explained": _explained(booked),
        "balance": in_words(booked, *(ledger.run.get("settings", {}).get(k) or 1 for k in ("every", "refresh"))),
        "gap": find_gap(ledger, target).line,
        "groups": groups,
        "audited": audits.line,
        "audits": [{k: s[k] for k in ("step", "r", "l2", "score_sum", "loss_drop")} for s in steps if s["r"] is not None],
        "windows": any(s["horizon"] is not None for s in booked),
        "charts": charts.draw(booked, groups, binned, columns["total"]),
        "tokens": _tokens(ledger, target, _TOKENS // len(ledger.targets)),
        "against": set_against(ledger, against, target, value),
        "books": {"samples": len(order), "booked": len(booked), "skipped": len(steps) - len(booked), **_told(steps, booked)},
    }


def _steps(ledger: LedgerReader, target: int) -> list[dict[str, Any]]:
    """A step a row, whatever the number of ranks."""
    return ledger.sql(
        """SELECT step, avg(score_sum) AS score_sum, avg(history) AS history, avg(val_loss) AS val_loss,
           bool_or(skipped) AS skipped, min(val_loss_at) AS val_loss_at, max(horizon) AS horizon,
           max(seconds) AS seconds, min(time) AS time, sum(samples) AS samples, max(audit_r) AS r, max(audit_relative_l2) AS l2,
           max(audit_loss_drop) AS loss_drop, min(coverage) AS coverage,
           max(by_passes) AS by_passes FROM steps WHERE target = ? GROUP BY step ORDER BY step""",
        [target],
    ).to_pylist()


def _groups(ledger: LedgerReader, target: int, samples: Any) -> tuple[list[dict[str, Any]], Any]:
    """What ``LedgerReader.groups`` says, and ``by_step``, from one pass over the scores; nothing where there is one group."""
    sizes = ledger.group_sizes(samples)
    if len(sizes) < 2:
        return [], None
    binned = ledger.by_step(target=target, bins=BLOCKS)
    names = list(sizes)
    place = {name: i for i, name in enumerate(names)}
    key = np.array([place[name] for name in binned["group"].to_pylist()])
    blocks, block = np.unique(binned["step"].to_numpy(), return_inverse=True)
    x = binned["value"].to_numpy()
    value = np.bincount(key, x, len(names))
    low, high = middle(resample(block, key, x, None, len(blocks), len(names), _DRAWS))
    found = [
        {"group": name, "value": value[i].item(), "low": low[i].item(), "high": high[i].item(), "samples": sizes[name]}
        | {"mean": value[i].item() / sizes[name]}
        for i, name in enumerate(names)
    ]
    return sorted(found, key=lambda group: -group["value"]), binned


def _curves(scores: Any, count: int) -> dict[int, list[list[float]]]:
    """Running sums of the scores of samples at either end, by their place: ``[steps, sums]``."""
    ends = {*range(min(_CURVES, count)), *range(max(0, count - _CURVES), count)}
    place, step, score = (scores[name].to_numpy() for name in ("place", "step", "score"))
    found = {}
    for i in sorted(ends):
        own = place == i
        x, y = step[own], np.cumsum(score[own])
        kept = charts.spread(len(x), _POINTS)
        found[i] = [x[kept].tolist(), y[kept].tolist()]
    return found


def _tokens(ledger: LedgerReader, target: int, room: int) -> list[dict[str, Any]]:
    """Sums over steps of token scores, of the samples whose tokens moved the loss most, as far as there is room for ``room``.

    Where a sample's tokens were cut otherwise in some steps, of those of its last length.
    """
    ids = ledger.sql(
        "SELECT sample FROM tokens WHERE target = ? GROUP BY sample ORDER BY abs(sum(list_sum(scores))) DESC, sample LIMIT ?",
        [target, _COLOURED],
    )["sample"].to_pylist()
    steps: dict[Hashable, list[np.ndarray]] = {}
    for row in ledger.tokens(ids, target=target).to_pylist():
        steps.setdefault(row["sample"], []).append(np.array(row["scores"], dtype=np.float64))
    found: list[dict[str, Any]] = []
    for sample in ids:
        alike = [scores for scores in steps[sample] if len(scores) == len(steps[sample][-1])]
        room -= len(alike[0])
        if room < 0 and found:
            break
        found.append({"sample": sample, "steps": len(alike), "scores": np.sum(alike, axis=0).tolist()})
    return found


def _explained(steps: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Parts of the drop; None where it was not measured, or nothing was lost."""
    found = balance(steps)
    if found is None or len(found.step) < 2 or not found.drop[-1] > 0 or any(s["horizon"] is not None for s in steps):
        return None
    drop, own, history = (float(x[-1]) for x in (found.drop, found.own, found.history))
    return {"drop": drop, "own": own, "history": history, "rest": drop - own - history}


def _told(steps: list[dict], booked: list[dict]) -> dict[str, float | None]:
    return {
        "coverage": min((s["coverage"] for s in steps), default=None),
        "by_passes": max((s["by_passes"] for s in steps), default=0.0),
        "seconds": float(np.median([s["seconds"] for s in booked])) if booked else None,
    }


def _facts(ledger: LedgerReader, targets: list[dict[str, Any]]) -> dict[str, str]:
    run, settings = ledger.run, ledger.run.get("settings", {})
    books, windows = targets[0]["books"], targets[0]["windows"]
    facts = {
        "Model": settings.get("model"),
        "Parameters": f"{settings['parameters']:,}" if "parameters" in settings else None,
        "Optimizer": settings.get("optimizer"),
        "Schedule": settings.get("schedule"),
        "Rule": settings.get("rule"),
        "Attributed steps": f"{books['booked']:,}",
        "Skipped steps": str(books["skipped"]),
        "Samples": f"{books['samples']:,}",
        "Validation losses": str(len(targets)) if len(targets) > 1 else None,
        "Parameters covered": None if books["coverage"] is None else f"{books['coverage']:.1%}",
        "Parameters scored by whole passes": f"{books['by_passes']:.1%}" if books["by_passes"] else None,
        # windows are booked when they are swept, which tells no pace
        "Attribution per step": None if windows or books["seconds"] is None else f"{1e3 * books['seconds']:.1f} ms",
        "Began": f"{datetime.fromtimestamp(run['created'], timezone.utc):%Y-%m-%d %H:%M} UTC",
        "PyTorch": run.get("versions", {}).get("torch"),
    }
    return {name: str(value) for name, value in facts.items() if value is not None}


def _from_the_ends(rankings: list[list]) -> list:
    """The ids of all rankings, those at an end first."""
    found = []
    for depth in range(max(map(len, rankings), default=0)):
        for ids in rankings:
            if 2 * depth < len(ids):
                found += [ids[depth], ids[-1 - depth]]
    return found


def _describe(ledger: LedgerReader, ids: list, coloured: set) -> dict[str, list]:
    """Columns of what the samples are, as far as there is room; ``coloured``: whose tokens are shown."""
    described = ledger.described(ids)
    rows = [described.get(i, {}) for i in ids]
    texts, images = _TEXTS, _IMAGES
    found: dict[str, list] = {"name": [str(i) for i in ids]}  # strings: a browser's numbers end at 53 bits
    found |= {name: [row.get(name) for row in rows] for name in ("group", "path")}
    found |= {"text": [], "cut": [], "image": [], "tokens": []}
    for row in rows:
        text, image = row.get("text") or "", _image(row.get("image"))
        size = len(text.encode())
        cut = size > texts and len(text) > _CUT
        found["text"].append((text[:_CUT] if cut else text) or None)
        found["cut"].append(cut)
        texts -= 0 if cut else size
        if image and len(image) > images:
            image = None
        found["image"].append(image)
        images -= len(image or "")
        found["tokens"].append(row.get("tokens") if row.get("sample") in coloured else None)
    return {name: column for name, column in found.items() if name == "name" or any(x not in (None, False) for x in column)}


def _image(found: bytes | None) -> str | None:
    if found is None:
        return None
    kind = next((k for magic, k in _KINDS.items() if found.startswith(magic)), None)
    return kind and f"data:image/{kind};base64,{base64.b64encode(found).decode()}"


def _short(value: Any) -> Any:
    """Numbers of five digits, as many as a page can show; JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.5g}") if math.isfinite(value) else None
