"""Two ledgers compared, and one watched, as the command line shows them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from made import totals, write
from rich.console import Console
from typer.testing import CliRunner

import adam_ghost as ag
from adam_ghost.cli import app
from adam_ghost.ledger.compare import compare, ranks
from adam_ghost.ledger.reader import open_ledger
from adam_ghost.watch import watch


@pytest.fixture
def two(tmp_path):
    """Ledgers of samples 0 to 19 and 5 to 24, with the books that they were made from."""
    steps = [write(tmp_path / name, ids=range(first, first + 20), seed=first) for name, first in (("a", 0), ("b", 5))]
    ag.describe_samples(tmp_path / "a", lambda i: {"group": "odd" if i % 2 else "even"})
    return tmp_path / "a", tmp_path / "b", steps


def invoke(*args):
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert "Traceback" not in done.output
    return done


def test_ranks_share_ties():
    assert ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2, 3.5, 1]


def test_compare(two):
    stats = pytest.importorskip("scipy.stats")
    a, b, steps = two
    with open_ledger(a) as first, open_ledger(b) as second:
        found = compare(first, second, k=3, value="total")
        same = compare(first, first)
    x, y = map(totals, steps)
    both = sorted(x.keys() & y.keys())
    assert (found.both, found.only_a, found.only_b) == (len(both), len(x) - len(both), len(y) - len(both))
    assert found.rank_correlation == pytest.approx(stats.spearmanr([x[i] for i in both], [y[i] for i in both]).statistic)
    places = {i: [1 + sum(t[j] > t[i] for j in both) for t in (x, y)] for i in both}
    moved = sorted((abs(p - q) for p, q in places.values()), reverse=True)
    assert [abs(m["place_a"] - m["place_b"]) for m in found.movers] == moved[:3]
    for m in found.movers:
        assert [m["place_a"], m["place_b"]] == places[m["sample"]] and m["group"] == ("odd" if m["sample"] % 2 else "even")
        assert m["a"] == pytest.approx(x[m["sample"]]) and m["b"] == pytest.approx(y[m["sample"]])
    groups = {row["group"]: (row["a"], row["b"]) for row in found.groups}
    assert groups["odd"] == (pytest.approx(sum(v for i, v in x.items() if i % 2)), None)
    assert groups["(none)"] == (None, pytest.approx(sum(y.values())))
    assert same.rank_correlation == pytest.approx(1) and same.only_a == 0 and all(m["a"] == m["b"] for m in same.movers)


def test_compare_as_a_command(two, tmp_path):
    a, b, _ = two
    done = invoke("compare", a, b, "-k", 2)
    assert done.exit_code == 0 and "Rank correlation" in done.output and "odd" in done.output
    found = json.loads(invoke("compare", a, b, "--json").output)
    assert len(found["movers"]) == 10 and -1 <= found["rank_correlation"] <= 1
    write(tmp_path / "named", name=lambda i: f"s{i}")
    done = invoke("compare", a, tmp_path / "named")
    assert done.exit_code == 2 and "ids are integers in the first ledger, strings in the second" in done.output
    assert invoke("compare", a, tmp_path / "nowhere").exit_code == 1
    assert invoke("compare", a, b, "--target", 3).exit_code == 2


def test_watch_looks_again(two):
    """What was written between two looks is in the second."""
    a, _, _ = two
    console = Console(record=True, width=200, force_terminal=True)
    looks = []

    def table(rows, title):
        looks.append((title, len(rows)))
        return title

    with open_ledger(a) as ledger:
        refreshed = ledger.refresh
        ledger.refresh = lambda: (ag.describe_samples(a, lambda i: {}), refreshed())
        watch(ledger, console, table, k=4, every=0.01, times=2)
    first = [("Most helpful", 4), ("Most harmful", 4), ("Groups", 2)]
    assert looks == [*first, *first[:2]]
    assert "step 15: 15 attributed, 0 skipped" in console.export_text()


def test_watch_as_a_command(two, tmp_path):
    a, _, _ = two
    done = invoke("watch", a, "--times", 1)
    assert done.exit_code == 0
    for part in ("15 attributed", "validation loss 1 at first", "Most helpful", "Most harmful", "odd", "add up"):
        assert part in done.output, done.output
    assert invoke("watch", tmp_path / "nowhere", "--times", 1).exit_code == 1
    assert invoke("watch", a, "--times", 1, "--target", 2).exit_code == 2


def test_estimate_as_a_command():
    done = invoke("estimate", "--gpu", "4090", "--samples", 8)
    assert done.exit_code == 0 and "lookahead" in done.output and "124 million parameters, 8192 tokens" in done.output
    found = json.loads(invoke("estimate", "--json").output)
    assert [row["schedule"] for row in found][:2] == ["plain", "midpoint"]
    assert invoke("estimate", "--gpu", "abacus").exit_code == 2 and invoke("estimate", "--layers", 0).exit_code == 2


def test_completion():
    asked = {"_ADAM_GHOST_COMPLETE": "complete_bash", "COMP_WORDS": "adam-ghost co", "COMP_CWORD": "1"}
    code = "from adam_ghost.cli import app; app(prog_name='adam-ghost')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["compare"], done.stderr
