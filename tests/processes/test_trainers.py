"""Accelerate, the Trainer and Lightning in two processes: scores of one process with the whole batch."""

import pytest
from compared import distance, joined
from frameworks import BATCH, accelerated, lit, trained

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
