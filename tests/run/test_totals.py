"""The scores object: sorted, and as a table."""

import numpy as np
import pytest

from adam_ghost.run.totals import SampleScores

IDS = ["a", "b", 7, "d"]


def scores(targets):
    total = np.array([[0.1, 4.0], [0.3, 3.0], [0.1, 2.0], [-0.2, 1.0]])
    standardized = np.array([[0.0, 1.0], [-1.0, 2.0], [2.0, 3.0], [0.0, 4.0]])
    if targets == 1:
        total, standardized = total[:, 0], standardized[:, 0]
    return SampleScores(IDS, total, standardized, np.array([3, 1, 2, 5]))


def test_sorted():
    assert scores(1).sorted().ids == [7, "a", "d", "b"]  # of equal ones the first stays first
    assert scores(1).sorted("total").ids == ["b", "a", 7, "d"]
    found = scores(2).sorted(target=1)
    assert found.ids == ["d", 7, "b", "a"] and found.steps.tolist() == [5, 2, 1, 3]
    assert found.total[:, 0].tolist() == [-0.2, 0.1, 0.3, 0.1]
    with pytest.raises(ValueError, match="target must be below 2"):
        scores(2).sorted(target=2)


def test_a_table():
    pytest.importorskip("pandas")
    table = scores(1).to_pandas()
    assert table.columns.tolist() == ["sample", "standardized", "total", "steps"]
    assert table["sample"].tolist() == [7, "a", "d", "b"] and table["total"].tolist() == [0.1, 0.1, -0.2, 0.3]
    table = scores(2).to_pandas()
    assert table.columns.tolist() == ["sample", "standardized_0", "standardized_1", "total_0", "total_1", "steps"]
    assert table["sample"].tolist() == [7, "a", "d", "b"] and table["total_1"].tolist() == [2.0, 4.0, 1.0, 3.0]
    none = np.zeros(0)
    assert len(SampleScores([], none, none, none).to_pandas()) == 0
