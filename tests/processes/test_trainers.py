"""Accelerate, the Trainer and Lightning in two processes: scores of one process with the whole batch."""

import numpy as np
import pytest
from compared import distance, joined
from frameworks import BATCH, accelerated, lit, titan, trained

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")


def check(found, expected, sharded):
    assert [mine[1] for mine in found] == [sharded, sharded]
    assert distance(joined([{"scores": mine[0]} for mine in found]), expected[0]) < 1e-11


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
def test_accelerate(shard, pair):
    check(pair.run(accelerated, shard), accelerated(False, 2 * BATCH), shard)


@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "shards"])
@pytest.mark.parametrize("schedule", ["midpoint", "window"])
def test_trainer(shard, schedule, pair, tmp_path):
    found = pair.run(trained, shard, schedule, str(tmp_path))
    check(found, trained(False, schedule, str(tmp_path), 2 * BATCH), shard)


@pytest.mark.slow  # to import it takes long
@pytest.mark.parametrize("schedule", ["midpoint", "window"])
@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_lightning(strategy, schedule, pair):
    pytest.importorskip("lightning")
    check(pair.run(lit, strategy, schedule), lit("auto", schedule, 2 * BATCH), strategy == "model_parallel")


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_torchtitan_loop(schedule, pair, tmp_path):
    """Scores add up to the step's gradient, and noise is told from text."""
    found = pair.run(titan, schedule, str(tmp_path / "state"))
    scores = {i: s for mine in found for i, s in mine[0].items()}
    assert len(scores) == 14 * 2 * 2 * 4
    for _, sums, totals in found:
        np.testing.assert_allclose(sums, totals, rtol=1e-3, atol=1e-6)
    worst = sorted(scores, key=scores.__getitem__)[:30]
    assert sum(i % 1000 % 3 == 0 for i in worst) > 20  # ten by chance
