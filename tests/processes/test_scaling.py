"""The counts of bench/scaling.py against what the real code exchanges."""

from pathlib import Path

import pytest
from faults import traffic

from bench.scaling import Exchanged, added, measure, plain, swept, table

UNIT, ROOT = 8 * 8 + 8, 8 * 4
N = 3 * UNIT + ROOT


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead"])
def test_a_step_exchanges_what_is_counted(schedule, K, pair):
    for found in pair.run(traffic, schedule, K):
        assert Exchanged(*found) == plain(N, ROOT) + added(schedule, N, ROOT, K)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("feedback", ["differences", "gauss-newton"])
def test_a_sweep_exchanges_what_is_counted(feedback, K, pair):
    for found in pair.run(traffic, "window", K, feedback):
        expected = swept(N, ROOT, UNIT, 3, 2, K, feedback == "differences")
        assert Exchanged(*found) == expected


def test_the_page_holds_the_table():
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text()
    assert table(measure()) in page
