"""The report in a real browser: it renders without errors, its filters work, and hostile texts stay text."""

import shutil

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("duckdb")
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
    selenium = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"):
        options.add_argument(flag)
    for flag in (
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--window-size=1200,1400",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_chromium(folder, browser, tmp_path, scheme):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    page = write_report(folder, tmp_path / "report.html", title=f"<i>{scheme}")
    browser.get(page.as_uri())
    css = "css selector"
    assert browser.title == f"<i>{scheme}"
    assert len(browser.find_elements(css, ".chart .main-svg")) >= 4
    assert browser.execute_script("return window.hacked") is None
    assert not browser.find_elements(css, "td script, td img[onerror], dd script")
    rows = "#table tbody tr"
    everything = len(browser.find_elements(css, rows))
    assert everything > 60
    search = browser.find_element(css, "#search")
    search.send_keys("text of 1")
    shown = [r.text for r in browser.find_elements(css, rows)]
    assert 0 < len(shown) < everything and all("text of 1" in r for r in shown)
    browser.execute_script("arguments[0].value = ''; arguments[0].oninput()", search)
    browser.find_elements(css, "#group option")[
        [o.text for o in browser.find_elements(css, "#group option")].index("books")
    ].click()
    assert all("books" in r.text for r in browser.find_elements(css, rows))
    browser.find_elements(css, "#table th button")[0].send_keys("\ue007")  # enter, from the keyboard
    ids = [int(r.text.split()[0]) for r in browser.find_elements(css, rows)]
    assert ids == sorted(ids, reverse=True)
    assert browser.switch_to.active_element.get_attribute("data-key") == "sample"
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert dark == (scheme == "dark")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(page.as_uri())
    wide = "return [...document.querySelectorAll('body *')]"
    wide += ".filter(e => e.getBoundingClientRect().right > 391 && !e.closest('.scroll, svg'))"
    assert browser.execute_script(wide + ".map(e => e.tagName + '.' + e.className + '#' + e.id)") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    # the only thing that may fail is the pretended picture
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "data:image" not in e["message"]] == []


def test_page_holds_no_hostile_markup_and_no_address_to_fetch(folder, tmp_path):
    page = write_report(folder, tmp_path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in page and "window.hacked" in page
    assert page.count("</script>") == 3 and 'src="http' not in page
    with pytest.raises(ValueError, match="target must be one of 0, got 3"):
        write_report(folder, tmp_path / "x.html", target=3)


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
    for gone in ('id="completeness"', 'id="throughput"', '"completeness":', "Attribution per step"):
        assert gone not in page
    assert "Windows are booked when they are swept" in page and "to train on to their window" in page
