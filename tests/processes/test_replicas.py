"""DistributedDataParallel: scores of one process with the whole batch; weights of plain DistributedDataParallel."""

import numpy as np
import pytest
import torch
from loops import EVEN, UNEVEN, WITH_NONE, train
from ranks import Ranks

# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("pair"))
    yield ranks
    ranks.close()


def joined(found, what="scores"):
    return {i: s for rank in found for i, s in rank[what].items()}


def distance(found, expected):
    """Relative, of what is known by id."""
    assert found.keys() == expected.keys()
    x, y = (np.array([each[i] for i in sorted(expected)]) for each in (found, expected))
    return np.linalg.norm(x - y) / np.linalg.norm(y)


CASES = {
    "midpoint": {"schedule": "midpoint"},
    "gauss": {"schedule": "gauss"},
    "lookahead": {"schedule": "lookahead"},
    "window": {"schedule": "window"},
    "split": {"schedule": "midpoint", "split": True},
    "inner": {"schedule": "lookahead", "inner": True},
    "uneven": {"schedule": "midpoint", "sizes": UNEVEN},
    "none": {"schedule": "midpoint", "sizes": WITH_NONE},
    "lookahead-none": {"schedule": "lookahead", "sizes": WITH_NONE, "split": True},
    "window-none": {"schedule": "window", "sizes": WITH_NONE, "split": True},
    "clipped": {"schedule": "midpoint", "clip": 0.05},
    "window-clipped": {"schedule": "window", "clip": 0.05},
    "accumulated": {"schedule": "midpoint", "micro": 2, "sizes": UNEVEN, "clip": 0.05},
    "lookahead-accumulated": {"schedule": "lookahead", "micro": 3},
    "window-accumulated": {"schedule": "window", "micro": 2, "sizes": UNEVEN},
    "static": {"schedule": "midpoint", "wrapper": {"static_graph": True}},
    "bucket-view": {"schedule": "midpoint", "micro": 2, "wrapper": {"gradient_as_bucket_view": True}},
    "unused": {"schedule": "midpoint", "extra": True, "wrapper": {"find_unused_parameters": True}},
    "lookahead-unused": {"schedule": "lookahead", "extra": True, "wrapper": {"find_unused_parameters": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(name, pair):
    case = dict(CASES[name])
    found = pair.run(train, "ddp", **case)
    plain = pair.run(train, "ddp", **case | {"schedule": None})
    case.pop("wrapper", None), case.pop("inner", None)
    expected = train("one", **case)

    assert distance(joined(found), expected["scores"]) < 1e-12
    assert distance(joined(found, "standardized"), expected["standardized"]) < 1e-9
    for mine in found:
        for what in ("sums", "totals", "val_loss"):
            np.testing.assert_allclose(mine[what], expected[what], rtol=1e-10, atol=1e-13)
        for w, x in zip(mine["weights"], plain[0]["weights"], strict=True):
            np.testing.assert_array_equal(w, x)
