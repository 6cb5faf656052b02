"""What to keep and how often to draw whom, from ledgers whose scores are known."""

from contextlib import closing

import numpy as np
import pytest

import adam_ghost
from adam_ghost.ledger.books import Arrived, StepRecord
from adam_ghost.run.totals import SampleScores
from adam_ghost.use import keep, weights

duckdb = pytest.importorskip("duckdb")
EVERY = {"describe": lambda i: {"group": "abc"[i % 3]}}


def write(folder, steps, means=(1.0, 0.0, -1.0), noise=1.0, seed=0, **options):
    """A ledger in which samples of group ``i % 3`` score ``means[i % 3]`` and noise, 12 of 30 samples to a step."""
    random = np.random.default_rng(seed)
    with closing(adam_ghost.LedgerWriter(folder, **options)) as writer:
        for step in range(1, steps + 1):
            ids = random.choice(30, 12, replace=False).tolist()
            scores = (np.array(means)[np.array(ids) % 3] + noise * random.normal(size=12))[:, None]
            record = StepRecord(step, 12, [1e-3], [1.0], True, [scores.sum()], [scores.sum()], [0.0], 1.0, False, 0.01)
            writer.begin(ids, lambda: {"model": "made"})
            writer.add(Arrived(record, ids, scores))
    return folder


def scored(values):
    return SampleScores(list("abcdef"), np.array(values) * 2, np.array(values), np.ones(6, dtype=np.int64))


def test_keep_of_scores():
    scores = scored([0.5, -1.0, 3.0, 0.5, 2.0, -2.0])
    assert keep(scores, 0.5) == ["c", "e", "a"]  # of equal ones the first
    assert keep(scores, 1) == ["c", "e", "a", "d", "b", "f"]
    assert keep(scores, 1e-9) == ["c"]
    both = scores._replace(total=np.stack([scores.total, -scores.total], 1), standardized=np.stack([scores.standardized] * 2, 1))
    assert keep(both, 0.3, target=1, value="total") == ["f", "b"]


def test_keep_of_a_ledger_is_keep_of_its_scores(tmp_path):
    folder = write(tmp_path / "run", 40)
    with adam_ghost.open_ledger(folder) as ledger:
        by_loop = {}
        for row in ledger.scores().to_pylist():
            by_loop[row["sample"]] = by_loop.get(row["sample"], 0.0) + row["score"]
        best = sorted(by_loop, key=lambda i: -by_loop[i])
        assert keep(ledger, 0.4, value="total") == keep(folder, 0.4, value="total") == best[:12]
        assert keep(ledger, 0.4) != keep(ledger, 0.4, steps=(1, 10))


@pytest.mark.parametrize(
    "how, error, message",
    [
        ({"fraction": 0.0}, ValueError, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.1}, ValueError, "fraction must be"),
        ({"value": "mean"}, ValueError, "value must be standardized or total"),
        ({"target": 1}, ValueError, "target must be below 1"),
        ({"steps": (1, 2)}, ValueError, "steps=.* needs a ledger"),
        ({"scores": scored([0.0] * 6)._replace(ids=[])}, ValueError, "nothing was attributed yet"),
        ({"scores": [1, 2]}, TypeError, "expected a ledger, open or its folder, or an InRun that writes one, got list"),
    ],
)
def test_keep_refuses(how, error, message):
    arguments = {"scores": scored([0.0] * 6), "fraction": 0.5} | how
    with pytest.raises(error, match=message):
        keep(arguments.pop("scores"), arguments.pop("fraction"), **arguments)


def test_weights_go_by_what_is_certain_at_least(tmp_path):
    folder = write(tmp_path / "run", 60, **EVERY)
    with pytest.warns(UserWarning, match="adam_ghost: no weight is recommended, and 1 given, for b:"):
        found = weights(folder, strength=2.0)
    rows = {row.group: row for row in found.rows}
    assert list(rows) == ["a", "b", "c"] and dict(found) == {g: row.weight for g, row in rows.items()}
    assert found["a"] == pytest.approx(np.exp(2 * rows["a"].low)) and rows["a"].low > 0.5
    assert found["c"] == pytest.approx(np.exp(2 * rows["c"].high)) and rows["c"].high < -0.5
    assert found["b"] == 1 and rows["b"].low < 0 < rows["b"].high and rows["b"].reason == "its interval holds zero"
    assert all(row.low < row.value < row.high and row.samples == 10 for row in found.rows)
    assert repr(found).splitlines()[1].endswith("its interval holds zero")


def test_weights_of_groups_that_are_alike_are_not_recommended(tmp_path):
    """Of 20 ledgers of noise alone an interval excludes zero by chance in one group of twenty, not in half of them."""
    recommended = 0
    for seed in range(20):
        folder = write(tmp_path / str(seed), 40, means=(0, 0, 0), seed=seed, **EVERY)
        with pytest.warns(UserWarning, match="no weight is recommended"):
            recommended += sum(not row.reason for row in weights(folder, bootstrap=200).rows)
    assert recommended <= 10  # of 60; 3 expected, and more than 10 has a probability of 1e-4


def test_few_steps_recommend_nothing(tmp_path):
    folder = write(tmp_path / "run", 9, noise=0.01, **EVERY)
    with pytest.warns(UserWarning, match="for a, b, c"):
        found = weights(folder)
    assert set(found.values()) == {1.0} and {row.reason for row in found.rows} == {"met in 9 steps, fewer than 10"}
    folder = write(tmp_path / "more", 40, noise=0.01, **EVERY)
    with pytest.warns(UserWarning, match="for a, b, c"):
        assert set(weights(folder, steps=(5, 13)).values()) == {1.0}


def test_weights_by_a_mapping(tmp_path):
    folder = write(tmp_path / "run", 60)
    found = weights(folder, by={i: "good" for i in range(0, 30, 3)})
    assert found["good"] > 1 > found["(none)"] and len(found) == 2


def test_weights_refuse(tmp_path):
    folder = write(tmp_path / "run", 12)
    for how, message in (
        ({"by": "domain"}, "by must be 'group' or a mapping from id to group, got 'domain'"),
        ({}, "no sample has a group"),
        ({"by": {0: "x"}, "bootstrap": 0}, "bootstrap must be at least 1"),
        ({"by": {0: "x"}, "steps": (100, 200)}, "no scores in these steps"),
        ({"by": {0: "x"}, "target": 3}, "target must be one of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            weights(folder, **how)
