"""``fully_shard`` (FSDP2): scores of one process with the whole batch; weights of plain ``fully_shard``."""

import numpy as np
import pytest
import torch
from compared import check_thin_layer, check_training, distance, joined
from faults import failing, half, refused_shards, riding
from loops import UNEVEN, WITH_NONE, train

# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")

CASES = {
    "midpoint": {"schedule": "midpoint"},
    "gauss": {"schedule": "gauss"},
    "lookahead": {"schedule": "lookahead", "steps": 14},
    "window": {"schedule": "window"},
    "window-kept-whole": {"schedule": "window", "wrapper": {"reshard_after_forward": False}, "steps": 6},
    "window-alone": {"schedule": "window", "options": {"feedback": "none"}, "steps": 6},
    "window-none": {"schedule": "window", "sizes": WITH_NONE, "split": True, "steps": 6},
    "window-clipped": {"schedule": "window", "clip": 0.05, "steps": 6},
    "window-accumulated": {"schedule": "window", "micro": 2, "sizes": UNEVEN, "steps": 6},
    "window-targets": {"schedule": "window", "targets": 2, "evaluated": True, "steps": 6},
    "split": {"schedule": "midpoint", "split": True},
    "lookahead-split": {"schedule": "lookahead", "split": True, "warm": True},
    "none": {"schedule": "midpoint", "sizes": WITH_NONE},
    "lookahead-none": {"schedule": "lookahead", "sizes": WITH_NONE, "warm": True},
    "accumulated": {"schedule": "midpoint", "micro": 2, "sizes": UNEVEN, "clip": 0.05},
    "lookahead-accumulated": {"schedule": "lookahead", "micro": 3, "sizes": UNEVEN, "clip": 0.05, "warm": True},
    "summed": {"schedule": "midpoint", "summed": True, "sizes": UNEVEN, "steps": 4},
    "lookahead-summed": {"schedule": "lookahead", "summed": True, "sizes": UNEVEN, "steps": 4, "warm": True},
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


@pytest.mark.parametrize("sizes", [((5, 3), (1, 6)), ((5, 3), (6, 0))], ids=["uneven", "none"])
def test_gauss_newton_is_that_of_replicas(sizes, pair):
    """Each process takes every fourth row of its own part of the batch, and has part in all passes where it has no sample."""
    case = {"schedule": "window", "options": {"feedback": "gauss-newton"}, "sizes": sizes, "steps": 6}
    found, expected, without = (
        joined(pair.run(train, how, **case | more))
        for how, more in (("fsdp", {}), ("ddp", {}), ("ddp", {"options": {"feedback": "none"}}))
    )
    assert distance(found, expected) < 1e-11 < 1e-3 < distance(without, expected)


def test_what_layer_calls_lose_is_left_out(pair):
    case = {"schedule": "midpoint", "hidden": True, "sizes": UNEVEN, "steps": 4}
    found = joined(pair.run(train, "fsdp", **case))
    with pytest.warns(UserWarning, match=r"not attributed: shift, head\.weight, head\.bias; the scores cover"):
        expected = train("one", **case, options={"fallback": False})
    assert distance(found, expected["scores"]) < 1e-12


@pytest.mark.parametrize("clip", [None, 0.05], ids=["whole", "clipped"])
def test_the_thin_layer(clip, pair):
    check_thin_layer(pair, "fsdp", clip)


def test_directions_ride_with_the_weights(pair):
    """Behind a unit's weights, ahead of its backward pass as these are, and freed after it."""
    for gathered, most, after, every in pair.run(riding):
        assert gathered == ["w3", "P3", "w2", "P2", "w1", "P1", "w0", "P0"]
        largest = 2 * 10 * 4 + 10 + 4
        assert most <= largest < every and after == 0


@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept-whole"])
@pytest.mark.parametrize(
    ("schedule", "options", "near"),
    [
        ("midpoint", {}, 0.02),
        ("lookahead", {}, 0.02),
        ("window", {"feedback": "none"}, 0.02),
        ("window", {"feedback": "differences"}, 0.06),
        ("window", {"feedback": "gauss-newton"}, 0.06),
    ],
    ids=lambda x: x.get("feedback", "") if isinstance(x, dict) else str(x),
)
def test_passes_in_half_precision(schedule, options, near, reshard, pair):
    """Weights are rounded to bfloat16, by half a percent, and what is computed of them; differences of gradients more.

    The gradient that is used is rounded once more than the samples', where it leaves the layer.
    """
    found = pair.run(half, schedule, reshard, **options)
    plain = pair.run(half, None, reshard)
    full = pair.run(half, schedule, reshard, torch.float32, **options)
    assert distance(joined(found), joined(full)) < near
    same = 6 * 1e-2 * 2**-8 if schedule == "lookahead" else 0  # as many steps by gradients that are rounded otherwise
    for mine in found:
        assert np.abs(np.subtract(mine["sums"], mine["totals"])).max() < 0.01 * np.abs(mine["totals"]).max()
        for w, x in zip(mine["weights"], plain[0]["weights"], strict=True):
            np.testing.assert_allclose(w, x, rtol=0, atol=same)


@pytest.mark.parametrize(
    ("where", "schedule", "error"),
    [
        ("batch", "midpoint", "RuntimeError: optimizer.step() without a recorded forward pass"),
        ("pruned", "window", "ValueError: 'shift' is not where steps"),
        ("other_loss", "window", "ValueError: step 2: train_loss(inputs), run again"),
    ],
)
def test_an_error_in_one_process_reaches_all(where, schedule, error, pair):
    healthy, sick = pair.run(failing, where, schedule, "fsdp")
    kind, text = error.split(": ", 1)  # what steps a window's sweep was of is said between the two
    assert sick.startswith(kind) and text in sick and sick.endswith(" 2")
    # what the whole parameters tell, both raise
    assert healthy.startswith(("PeerFailed", kind)) and text in healthy and healthy.endswith(" 2")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("part", "the model itself is not: call fully_shard(model) last"),
        ("hybrid", "mesh of 2 dimensions"),
        ("offloaded", "CPUOffloadPolicy is not supported"),
        ("ignored", "'shift' is whole in every process (ignored_params)"),
        ("double", "feedback='double' is not supported where fully_shard shards the model"),
        ("forward", "feedback='forward' is not supported where fully_shard shards the model"),
        ("fallback", "fallback=True needs the model's whole weights for a forward-mode pass, which fully_shard keeps in parts"),
        ("fallback_of_the_thin_layer", "fallback=True needs the model's whole weights"),
        ("unaveraged", "gradients are not averaged over the 2 processes"),
        ("divided", "set_gradient_divide_factor() must be the same for the whole model, got [2, 3.0]"),
        ("divided_window", "schedule='window' takes gradients that are means over the processes"),
    ],
)
def test_other_shards_are_refused(what, message, pair):
    for said in pair.run(refused_shards, what):
        assert message in said
