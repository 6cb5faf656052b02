"""The report in a real browser: it renders without errors, its filters work, and hostile texts stay text."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("duckdb")
from chromium import PHONE, Chromium
from typer.testing import CliRunner

import adam_ghost as ag
from adam_ghost.cli import app
from adam_ghost.ledger.books import Arrived, Audit, StepRecord
from adam_ghost.report import write_report

HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
PIXEL = b"\x89PNG\r\n\x1a\n" + b"not a picture, but never markup"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ledger of 60 steps, written without training."""
    folder = tmp_path_factory.mktemp("ledger")
    groups = ("web", "books", HOSTILE)

    def describe(i):
        return {"group": groups[i % 3], "text": HOSTILE if i % 3 == 2 else f"text of {i}", "path": f"file{i}", "image": PIXEL}

    writer = ag.LedgerWriter(folder, describe=describe)
    random = np.random.default_rng(0)
    settings = {"model": HOSTILE, "parameters": 10, "optimizer": "AdamW", "schedule": "midpoint", "rule": "secant"}
    for step in range(1, 61):
        ids = random.integers(0, 90, 8).tolist()
        writer.begin(ids, lambda: settings)
        scores = random.normal(0.01, 0.05, (8, 1)) + np.array([[0.03 * (i % 3 == 0)] for i in ids])
        total = float(scores.sum())
        record = StepRecord(step, 8, [1e-3], [3 - 0.02 * step], True, [total], [total], [0.001], 1.0, False, 0.01, epoch=0)
        if step == 30:
            record = StepRecord(step, 8, [1e-3], [], True, [], [], [], 1.0, True, 0.01, epoch=0)
        record.val_loss_at = 0.5
        record.audit = Audit(0.999, 0.01, [total]) if step % 20 == 0 else None
        writer.add(Arrived(record, ids, None if record.skipped else scores))
    writer.close()
    return folder


@pytest.fixture(scope="module")
def browser():
    found = Chromium()
    yield found
    found.close()


def texts(browser, css):
    return browser.run(f"[...document.querySelectorAll({json.dumps(css)})].map(e => e.textContent)")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_chromium(folder, browser, tmp_path, dark):
    page = write_report(folder, tmp_path / "report.html", title="<i>title", against=folder)
    browser.errors.clear()
    browser.open(page, dark=dark)
    assert browser.run("document.title") == "<i>title" and browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('td script, td img[onerror], dd script, li script').length") == 0
    charts = browser.run(
        "[...document.querySelectorAll('figure')].filter(f => !f.hidden && f.querySelector('svg')).map(f => f.dataset.chart)"
    )
    assert sorted(charts) == ["against", "balance", "followed", "groups", "pace", "spread"]
    assert browser.run("document.querySelectorAll('figure path').length") >= 15  # curves, none without points
    assert browser.run("[...document.querySelectorAll('path, rect, circle')].some(e => /NaN/.test(e.outerHTML))") is False
    assert len(texts(browser, "#helpful > li")) == len(texts(browser, "#harmful > li")) == 10
    assert browser.run("getComputedStyle(document.body).backgroundColor") == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    # the only thing that may fail is the pretended picture
    assert [e for e in browser.errors if "data:image" not in e] == []


def test_the_table_searches_sorts_and_opens(folder, browser, tmp_path):
    browser.open(write_report(folder, tmp_path / "report.html"))
    rows, table = "#table tbody tr", "document.querySelector('#table')"
    assert len(texts(browser, rows)) == 25
    browser.run("document.querySelector('#more').click()")
    everything = len(texts(browser, rows))
    assert everything > 60
    find = "(w => { const s = document.querySelector('#search'); s.value = w; s.oninput(); })"
    browser.run(f"{find}('text of 1')")
    shown = texts(browser, rows)
    assert 0 < len(shown) < everything and all("text of 1" in row for row in shown)
    browser.run(f"{find}('')")
    browser.run("(g => { g.value = 'books'; g.onchange(); })(document.querySelector('select'))")
    assert all("books" in row for row in texts(browser, rows))
    browser.run(f"{table}.querySelector('th button').focus(); {table}.querySelector('th button').click()")
    ids = list(map(int, texts(browser, rows + " .opens")))
    assert ids == sorted(ids, reverse=True) and browser.run("document.activeElement.dataset.key") == "name"
    browser.run(f"{table}.querySelector('.opens').click()")
    (told,) = texts(browser, "#table .detail")
    assert f"text of {ids[0]}" in told and f"file{ids[0]}" in told
    browser.run(f"{table}.querySelector('.opens').click()")
    assert texts(browser, "#table .detail") == []


def test_on_a_phone_nothing_is_wider_than_it(folder, browser, tmp_path):
    browser.open(write_report(folder, tmp_path / "report.html", against=folder), width=PHONE)
    browser.run("document.querySelectorAll('summary').forEach(s => s.click())")
    browser.run("document.querySelector('#table .opens').click()")
    browser.run("new Promise(done => setTimeout(done, 100))")  # the samples' own charts
    wide = (
        f"[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > {PHONE + 1} && !e.closest('svg'))"
    )
    assert browser.run(wide + ".map(e => e.tagName + '.' + e.className + '#' + e.id)") == []
    assert browser.run("document.documentElement.scrollWidth") <= PHONE


def test_texts_are_coloured_token_by_token(browser, tmp_path):
    """Of what tokens say, of a text with as many characters as tokens, and of a text of which neither is known."""
    said = {0: {"tokens": ["<b>one</b>", " two", " three"]}, 1: {"text": "abc"}, 2: {"text": "longer"}}
    writer = ag.LedgerWriter(tmp_path / "ledger", describe=said.get)
    for step in range(1, 4):
        writer.begin([0, 1, 2], dict)
        scores = np.array([[-2.0], [1.0], [0.5]])
        sums = scores.sum(0).tolist()
        record = StepRecord(step, 3, [1e-3], [1.0], True, sums, sums, [0.0], 1.0, False, 0.01, tokens=3)
        arrived = Arrived(record, [0, 1, 2], scores)
        parts = np.array([[1.0], [-0.5], [0.5]]) if step < 3 else np.array([[1.0], [0.0], [0.0]])
        arrived.tokens = [(i, (parts * x).astype(np.float32)) for i, x in enumerate(scores[:, 0])]
        writer.add(arrived)
    writer.close()
    browser.open(write_report(tmp_path / "ledger", tmp_path / "report.html"))
    assert texts(browser, "#coloured .name b") == ["0", "1", "2"]  # by how much their tokens did
    assert texts(browser, "#coloured .tokens") == ["<b>one</b> two three", "abc", "\u00b7\u00b7\u00b7"]
    deep = "[...document.querySelectorAll('#coloured .tokens')]"
    deep += ".map(p => [...p.children].map(t => t.className + t.style.getPropertyValue('--much')))"
    # sums over steps: 3, -1, 1 of what the sample did
    assert browser.run(deep) == [["minus80%", "plus27%", "minus27%"], *[["plus80%", "minus27%", "plus27%"]] * 2]
    colours = "[...document.querySelectorAll('#coloured .tokens span')].slice(0, 2).map(t => getComputedStyle(t).backgroundColor)"
    assert len(set(browser.run(colours))) == 2
    browser.run("document.querySelector('#coloured .tokens span').dispatchEvent(new PointerEvent('pointermove'))")
    assert texts(browser, "#tip") == ["token 0: \u22126"]
    browser.run("[...document.querySelectorAll('#table .opens')].find(b => b.textContent === '1').click()")
    assert texts(browser, "#table .detail .tokens") == ["abc"]


def several(folder, *, steps=40, targets=2, group=None, text=None, image=None, ids=range(50), seed=0):
    """A ledger of ``steps`` steps of 8 samples; sample 7 harms target 1, sample 3 target 0."""

    def describe(i):
        return {"group": group and group(i), "text": text and text(i), "image": image and image(i)}

    writer, random = ag.LedgerWriter(folder, describe=describe), np.random.default_rng(seed)
    for step in range(1, steps + 1):
        chosen = random.choice(list(ids), 8, replace=False).tolist()
        writer.begin(chosen, dict)
        scores = random.normal(0.01, 0.001, (8, targets))
        for sample, target in ((3, 0), (7, 1)):
            if target < targets and sample in chosen:
                scores[chosen.index(sample), target] -= 0.05
        sums = scores.sum(0).tolist()
        record = StepRecord(step, 8, [1e-3], [1.0] * targets, True, sums, sums, [0.0] * targets, 1.0, False, 0.01)
        writer.add(Arrived(record, chosen, scores))
    writer.close()
    return folder


def test_every_target_has_its_part_and_the_page_switches(browser, tmp_path):
    browser.open(write_report(several(tmp_path / "ledger"), tmp_path / "report.html"))
    for target, worst in ((1, "7"), (0, "3")):
        browser.run(f"document.querySelectorAll('#targets button')[{target}].click()")
        assert texts(browser, "#harmful .name b")[0] == worst
        assert f"raised validation loss {target} by" in texts(browser, "h1")[0]
        assert texts(browser, "[aria-checked=true]") == [f"Validation loss {target}"]
    assert browser.run("document.querySelector('#groups').hidden && document.querySelector('#against').hidden")


def test_values_and_intervals_are_the_ledgers(folder, tmp_path):
    data = data_of(write_report(folder, tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = data["targets"][0]["rows"]
    place = {name: i for i, name in enumerate(data["samples"]["name"])}
    at = {sample: i for i, sample in enumerate(rows["sample"])}
    with ag.open_ledger(folder) as ledger:
        for value in ("standardized", "total"):
            for row in ledger.top(20, value=value, bootstrap=200).to_pylist():
                i = at[place[str(row["sample"])]]
                assert rows[value][i] == pytest.approx(row["value"], rel=1e-4)
                ends = [rows[value + "_low"][i], rows[value + "_high"][i]]
                assert ends == ([None, None] if row["n"] == 1 else pytest.approx([row["low"], row["high"]], rel=1e-4))
        named = {group["group"]: group for group in data["targets"][0]["groups"]}
        for group in ledger.groups().to_pylist():
            for name in ("value", "low", "high", "samples", "mean"):
                assert named[group["group"]][name] == pytest.approx(group[name], rel=1e-4)
        one = ledger.show(data["samples"]["name"][rows["sample"][0]])
        steps, sums = data["targets"][0]["curves"]["0"]
        assert steps == one["steps"]["step"].to_pylist()
        np.testing.assert_allclose(sums, np.cumsum(one["steps"]["score"].to_numpy()), rtol=1e-4)


def test_the_sentence_counts_the_samples_at_the_end(tmp_path):
    folder = several(tmp_path / "ledger", targets=1, steps=60, ids=range(100))
    first = data_of(write_report(folder, tmp_path / "x.html").read_text(encoding="utf-8"))["targets"][0]["headline"]
    with ag.open_ledger(folder) as ledger:
        count = ledger.totals().num_rows
        bottom = ledger.top(round(0.03 * count), harmful=True)
        harm = bottom["total"].to_numpy().sum()
        ids = {i: "these" for i in bottom["sample"].to_pylist()}
        (these,) = [g for g in ledger.groups(ids).to_pylist() if g["group"] == "these"]
    assert f"The {len(bottom)} most harmful of {count} samples" in first["sentence"]
    assert (f"raised the validation loss by {-harm:.3g}" if harm < 0 else f"lowered the validation loss, by {harm:.3g}") in first[
        "sentence"
    ]
    low, high = (
        sorted((abs(these["low"]), abs(these["high"]))) if these["low"] * these["high"] > 0 else (-these["high"], -these["low"])
    )
    assert f"{low:.3g} to {high:.3g}" in first["note"]
    assert ("holds zero" in first["note"]) == (these["low"] <= 0 <= these["high"])


def test_the_page_stays_small_whatever_samples_hold(tmp_path):
    picture = PIXEL + bytes(10_000)
    folder = several(tmp_path / "ledger", steps=400, targets=2, text=lambda i: "ä" * 2000, image=lambda i: picture, ids=range(3000))
    page = write_report(folder, tmp_path / "report.html")
    assert page.stat().st_size < 1.5e6
    data = data_of(page.read_text(encoding="utf-8"))
    samples, ends = data["samples"], [data["targets"][0]["rows"]["sample"][i] for i in (0, 1, -1)]
    assert all(len(samples["text"][i]) == 2000 and samples["image"][i] for i in ends)
    assert sum(samples["cut"]) > 100 and all(len(t) == 60 for t, cut in zip(samples["text"], samples["cut"], strict=True) if cut)


def test_beside_another_run(tmp_path):
    a = several(tmp_path / "a", targets=1, group=lambda i: "even" if i % 2 == 0 else "odd")
    b = several(tmp_path / "b", targets=1, seed=1, ids=range(10, 60))
    done = CliRunner().invoke(app, ["report", str(a), "--against", str(b), "--out", str(tmp_path / "x.html")])
    assert done.exit_code == 0, done.output
    found = data_of((tmp_path / "x.html").read_text(encoding="utf-8"))["targets"][0]["against"]
    compared = json.loads(CliRunner().invoke(app, ["compare", str(a), str(b), "--json"]).output)
    assert (found["both"], found["only_here"], found["only_there"]) == (compared["both"], compared["only_a"], compared["only_b"])
    assert found["correlation"] == pytest.approx(compared["rank_correlation"], rel=1e-4) and found["folder"] == "b"
    assert [row["sample"] for row in found["movers"]] == [str(row["sample"]) for row in compared["movers"]]
    (dots,) = found["chart"]["series"]
    with ag.open_ledger(a) as first, ag.open_ledger(b) as second:
        x, y = ({r["sample"]: r["value"] for r in t.totals(value="standardized").to_pylist()} for t in (first, second))
    expected = sorted((x[i], y[i]) for i in x.keys() & y.keys())
    np.testing.assert_allclose(list(zip(dots["x"], dots["y"], strict=True)), expected, rtol=1e-4)


def test_page_holds_no_hostile_markup_and_no_address_to_fetch(folder, tmp_path):
    page = write_report(folder, tmp_path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "window.hacked" in page
    assert page.count("</script>") == 2 and 'src="http' not in page
    with pytest.raises(ValueError, match="value must be one of"):
        write_report(folder, tmp_path / "x.html", value="mean")


COMMANDS = [
    (["top", "{}", "-k", "3"], 0, "sample"),
    (["top", "{}", "-n", "3"], 0, "sample"),
    (["top", "{}", "--json", "--harmful", "--bootstrap", "20"], 0, '"low"'),
    (["groups", "{}", "--json"], 0, '"books"'),
    (["show", "{}", "3"], 0, "standardized"),
    (["show", "{}", "3", "--json"], 0, '"steps"'),
    (["audit", "{}", "--json"], 0, '"largest_gap"'),
    (["audit", "{}", "--min-r", "0.9999"], 1, "correlation is below 0.9999 in steps 20"),
    (["top", "{}"], 0, "gradients within 0.0%"),
    (["top", "{}", "--target", "3"], 2, "target must be one of 0, got 3"),
    (["groups", "{}", "--target", "3"], 2, "target must be one of 0, got 3"),
    (["audit", "{}", "--target", "3"], 2, "target must be one of 0, got 3"),
    (["export", "{}", "--target", "3"], 2, "target must be one of 0, got 3"),
    (["top", "{}", "--value", "share"], 2, "value must be one of standardized, total"),
    (["report", "{}", "--value", "total"], 0, "report.html"),
    (["--version"], 0, ag.__version__),
    (["doctor", "--json"], 0, '"torch"'),
    (["export", "{}", "--csv", "{}/x.csv"], 0, ""),
    (["report", "{}"], 0, "report.html"),
    (["show", "{}", "-5"], 1, "no score of sample -5"),
    (["top", "{}", "--from", "500"], 0, "No sample was scored in these steps."),
    (["show", "{}", "12345"], 1, "no score of sample 12345"),
    (["top", "/nowhere"], 1, "no ledger"),
    (["top", "{}", "--value", "mean"], 2, "value must be one of"),
    (["groups", "{}", "--by", "/nowhere.csv"], 1, "no file"),
]


@pytest.mark.parametrize(("args", "code", "says"), COMMANDS, ids=[" ".join(c[0]).replace("{} ", "") for c in COMMANDS])
def test_commands(folder, args, code, says):
    done = CliRunner().invoke(app, [a.format(folder) for a in args])
    assert done.exit_code == code, done.output
    assert says in done.output and "Traceback" not in done.output


FILES = [
    ("\ufeffsample,group\n0,a\n1,b\n".encode(), 0, "a"),  # as Excel writes UTF-8
    ("sample,group\n0,caf\xe9\n".encode("latin-1"), 2, "must be a CSV in UTF-8"),
    (b"sample,group\n0,a\n0,b\n", 2, "line 3: sample '0' has two groups, 'a' and 'b'"),
    (b"sample,group\n0\n", 2, "line 2: sample '0' has no group"),
    (b"sample,group\n900,a\n", 2, "names none of the ledger's samples, whose ids are such as"),
    (b"id,name\n0,a\n", 2, "must have the columns sample and group, it has id, name"),
]


@pytest.mark.parametrize(("text", "code", "says"), FILES)
def test_files_of_groups(folder, tmp_path, text, code, says):
    path = tmp_path / "groups.csv"
    path.write_bytes(text)
    done = CliRunner().invoke(app, ["groups", str(folder), "--by", str(path)])
    assert done.exit_code == code, done.output
    assert says in " ".join(done.output.split()) and "Traceback" not in done.output


def test_windows_are_not_held_against_the_drop(tmp_path):
    """Credit looks ahead of its step: no chart adds it up to the loss, and the books' times are of sweeps."""
    writer = ag.LedgerWriter(tmp_path / "ledger")
    for step in range(1, 5):
        writer.begin([0, 1], lambda: {"schedule": "window"})
        nan = float("nan")
        record = StepRecord(step, 2, [1e-3], [2.0], True, [1.0], [1.0], [nan], 1.0, False, 0.01, window=1, horizon=4 - step)
        record.audit = Audit(0.99, 0.1, []) if step == 1 else None
        writer.add(Arrived(record, [0, 1], np.array([[0.25], [0.75]])))
    writer.close()
    page = write_report(tmp_path / "ledger", tmp_path / "report.html").read_text(encoding="utf-8")
    (target,) = data_of(page)["targets"]
    assert target["windows"] and target["explained"] is None and not {"balance", "pace"} & target["charts"].keys()
    assert "Attribution per step" not in data_of(page)["facts"] and "as far as their steps" in target["headline"]["sentence"]
