"""``fully_shard`` (FSDP2): scores of one process with the whole batch; weights of plain ``fully_shard``."""

import numpy as np
import pytest
from compared import check_thin_layer, check_training
from faults import failing, half, refused_shards, riding
from loops import UNEVEN, WITH_NONE

CASES = {
    "midpoint": {"schedule": "midpoint"},
    "gauss": {"schedule": "gauss"},
    "lookahead": {"schedule": "lookahead", "steps": 14},
    "split": {"schedule": "midpoint", "split": True},
    "lookahead-split": {"schedule": "lookahead", "split": True, "warm": True},
    "none": {"schedule": "midpoint", "sizes": WITH_NONE},
    "lookahead-none": {"schedule": "lookahead", "sizes": WITH_NONE, "warm": True},
    "accumulated": {"schedule": "midpoint", "micro": 2, "sizes": UNEVEN, "clip": 0.05},
    "lookahead-accumulated": {"schedule": "lookahead", "micro": 3, "sizes": UNEVEN, "clip": 0.05, "warm": True},
    "kept-whole": {"schedule": "midpoint", "wrapper": {"reshard_after_forward": False}},
    "targets": {"schedule": "midpoint", "targets": 2, "steps": 4},
    "lookahead-targets": {"schedule": "lookahead", "targets": 2, "split": True, "steps": 4, "warm": True},
    "evaluated": {"schedule": "midpoint", "evaluated": True, "steps": 4},
    "lookahead-evaluated": {"schedule": "lookahead", "evaluated": True, "micro": 2, "steps": 4, "warm": True},
    "lookahead-kept-whole": {"schedule": "lookahead", "wrapper": {"reshard_after_forward": False}, "warm": True},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(name, pair):
    check_training(pair, "fsdp", CASES[name])


@pytest.mark.parametrize("clip", [None, 0.05], ids=["whole", "clipped"])
def test_the_thin_layer(clip, pair):
    check_thin_layer(pair, "fsdp", clip)


def test_directions_ride_with_the_weights(pair):
    """Behind a unit's weights, ahead of its backward pass as these are, and freed after it."""
    for gathered, most, after, every in pair.run(riding):
        assert gathered == ["w3", "P3", "w2", "P2", "w1", "P1", "w0", "P0"]
        largest = 2 * 10 * 4 + 10 + 4
        assert most <= largest < every and after == 0


def test_passes_in_half_precision(pair):
    """The gradient that is used is rounded where the processes' gradients are added up: to bfloat16's half a percent."""
    for sums, totals in pair.run(half, 4):
        assert np.abs(np.subtract(sums, totals)).max() < 0.01 * np.abs(totals).max()


def test_an_error_in_one_process_reaches_all(pair):
    healthy, sick = pair.run(failing, "batch", "midpoint", "fsdp")
    error = "RuntimeError: optimizer.step() without a recorded forward pass"
    assert sick.startswith(error) and healthy.startswith(f"PeerFailed: process 1 raised {error}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("part", "the model itself is not: call fully_shard(model) last"),
        ("hybrid", "mesh of 2 dimensions"),
        ("offloaded", "CPUOffloadPolicy is not supported"),
        ("ignored", "'shift' is whole in every process (ignored_params)"),
        ("unaveraged", "gradients are not averaged over the 2 processes"),
        ("divided", "set_gradient_divide_factor() is not supported"),
    ],
)
def test_other_shards_are_refused(what, message, pair):
    for said in pair.run(refused_shards, what):
        assert message in said
