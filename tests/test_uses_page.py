"""docs/using-scores.md says what was measured, and the measurements are what they are said to be."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "using-scores.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "bench" / "results" / "uses-cpu.json").read_text(encoding="utf-8"))["uses"]
pytest.importorskip("sklearn")
from bench import uses  # noqa: E402


def test_the_tables_are_what_was_measured():
    assert uses.page(PAGE, RESULTS) == PAGE
    assert {use for use, _ in uses.TABLES.values()} == RESULTS.keys()


def test_a_difference_is_bold_where_its_interval_does_not_hold_zero():
    assert uses._difference({"behind": 0.25, "behind_half": 0.125}, 3) == "**-0.250 +- 0.125**"
    assert uses._difference({"behind": -0.1, "behind_half": 0.125}, 2) == "+0.10 +- 0.12"


def test_a_use_at_its_smallest(monkeypatch):
    monkeypatch.setattr(uses, "AT", 20)
    rows = uses.spike(seed=11)["spike"]
    assert list(rows) == list(RESULTS["spike"])
    assert rows[uses.EVERYTHING]["broken left"] == 1 and rows["the broken ones"]["broken left"] in (0, 1)
    assert all(0 < row["accuracy"] < 1 and 0 < row["loss"] < 5 for row in rows.values())
