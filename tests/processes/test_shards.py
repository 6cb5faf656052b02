"""``fully_shard`` (FSDP2): scores of one process with the whole batch; weights of plain ``fully_shard``."""

import numpy as np
import pytest
import torch
from compared import distance, joined
from loops import UNEVEN, WITH_NONE, train

CASES = {
    "midpoint": {"schedule": "midpoint"},
    "gauss": {"schedule": "gauss"},
    "split": {"schedule": "midpoint", "split": True},
    "none": {"schedule": "midpoint", "sizes": WITH_NONE},
    "accumulated": {"schedule": "midpoint", "micro": 2, "sizes": UNEVEN, "clip": 0.05},
    "kept-whole": {"schedule": "midpoint", "wrapper": {"reshard_after_forward": False}},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(name, pair):
    case = dict(CASES[name])
    found = pair.run(train, "fsdp", **case)
    plain = pair.run(train, "fsdp", **case | {"schedule": None})
    case.pop("wrapper", None)
    expected = train("one", **case)
    assert distance(joined(found), expected["scores"]) < 1e-12
    assert distance(joined(found, "standardized"), expected["standardized"]) < 1e-9
    for mine in found:
        for what in ("sums", "totals", "val_loss"):
            np.testing.assert_allclose(mine[what], expected[what], rtol=1e-10, atol=1e-13)
        for w, x in zip(mine["weights"], plain[0]["weights"], strict=True):
            np.testing.assert_array_equal(w, x)
