"""Four processes, with shares of every size: scores of one process with the whole batch, weights of a training without scores."""

import pytest
from compared import check_training

# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")

CASES = {
    "midpoint": {"micro": 2, "clip": 0.05, "steps": 3},
    "gauss": {"steps": 3},
    "lookahead": {"micro": 2, "clip": 0.05, "steps": 3, "warm": True},
    "window": {"micro": 2, "clip": 0.05, "steps": 6},
}


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", CASES)
def test_scores_are_those_of_one_process(schedule, spread, four):
    sizes = ((3, 1, 2, 2), (2, 0, 4, 1))
    check_training(four, spread, CASES[schedule] | {"schedule": schedule, "sizes": sizes})
