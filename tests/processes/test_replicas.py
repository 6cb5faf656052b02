"""DistributedDataParallel: scores of one process with the whole batch; weights of plain DistributedDataParallel."""

import numpy as np
import pytest
import torch
from compared import check_thin_layer, check_training, distance, joined
from faults import averaging_hook, by_torchs_products, failing, random_validation, refused
from loops import UNEVEN, WITH_NONE, train

# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")


CASES = {
    "midpoint": {"schedule": "midpoint"},
    "lookahead": {"schedule": "lookahead"},
    "window": {"schedule": "window"},
    "inner": {"schedule": "lookahead", "inner": True},
    "none": {"schedule": "midpoint", "sizes": WITH_NONE},
    "lookahead-none": {"schedule": "lookahead", "sizes": WITH_NONE, "split": True},
    "window-none": {"schedule": "window", "sizes": WITH_NONE, "split": True},
    "window-clipped": {"schedule": "window", "clip": 0.05},
    "accumulated": {"schedule": "midpoint", "micro": 2, "sizes": UNEVEN, "clip": 0.05},
    "lookahead-accumulated": {"schedule": "lookahead", "micro": 3},
    "window-accumulated": {"schedule": "window", "micro": 2, "sizes": UNEVEN},
    "targets": {"schedule": "midpoint", "targets": 2, "steps": 4},
    "lookahead-targets": {"schedule": "lookahead", "targets": 2, "split": True, "steps": 4, "warm": True},
    "static": {"schedule": "midpoint", "wrapper": {"static_graph": True}},
    "bucket-view": {"schedule": "midpoint", "micro": 2, "wrapper": {"gradient_as_bucket_view": True}},
    "unused": {"schedule": "midpoint", "extra": True, "wrapper": {"find_unused_parameters": True}},
    "lookahead-unused": {"schedule": "lookahead", "extra": True, "wrapper": {"find_unused_parameters": True}},
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_one_process(name, pair):
    check_training(pair, "ddp", CASES[name])


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
def test_lookahead_differs_from_training_by_linear_layers_products_alone(spread, pair):
    for found, plain in pair.run(by_torchs_products, spread):
        assert all(np.array_equal(w, x) for w, x in zip(found, plain, strict=True))


LOST = {
    "midpoint": {"schedule": "midpoint", "sizes": UNEVEN, "micro": 2, "clip": 0.05},
    "lookahead": {"schedule": "lookahead", "sizes": WITH_NONE},
    "window": {"schedule": "window", "sizes": UNEVEN, "micro": 2, "steps": 6},
}


@pytest.mark.filterwarnings("ignore:adam_ghost. lost by the layer calls")
@pytest.mark.parametrize("name", LOST)
def test_what_layer_calls_lose_is_scored_by_passes_of_the_model(name, pair):
    case = LOST[name] | {"hidden": True}
    check_training(pair, "ddp", case)
    for mine in pair.run(train, "ddp", **case):
        assert 0 < min(mine["by_passes"]) <= max(mine["by_passes"]) < 1


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_single_precision(schedule, spread, pair):
    """Over a training rounding grows; over a step it does not."""
    case = {"schedule": schedule, "dtype": torch.float32, "steps": 1, "warm": True}
    assert distance(joined(pair.run(train, spread, **case)), train("one", **case)["scores"]) < 1e-6


@pytest.mark.parametrize("clip", [None, 0.05], ids=["whole", "clipped"])
def test_the_thin_layer(clip, pair):
    check_thin_layer(pair, "ddp", clip)


@pytest.mark.parametrize(
    ("where", "error", "schedule"),
    [
        ("val_loss", "ArithmeticError: no validation today", "midpoint"),
        ("val_loss", "ArithmeticError: no validation today", "window"),
        ("val_loss", "ArithmeticError: no validation today", "lookahead"),
        ("batch", "RuntimeError: optimizer.step() without a recorded forward", "midpoint"),
    ],
)
def test_an_error_in_one_process_reaches_all(where, error, schedule, pair):
    healthy, sick = pair.run(failing, where, schedule)
    kind, text = error.split(": ", 1)  # what steps a window's sweep was of is said between the two
    assert sick.startswith(kind) and text in sick and sick.endswith(" 2")
    assert healthy.startswith("PeerFailed") and f"process 1 raised {error}" in healthy and healthy.endswith(" 2")


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            "batch",
            "the processes do not do the same: process 0 is at a step's first run.batch, process 1 is at a forward pass before",
        ),
        ("ids", "process 1 raised TypeError"),
    ],
)
def test_lookahead_is_announced_in_all_processes_or_in_none(where, said, spread, pair):
    """Its validation pass would meet another process's training pass."""
    healthy, sick = pair.run(failing, where, "lookahead", spread)
    assert said in healthy and healthy.endswith(" 2") and sick.endswith(" 2")
    assert sick.startswith("TypeError" if where == "ids" else "PeerFailed")


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead", "window"])
def test_a_step_is_skipped_in_all_processes_or_in_none(schedule, spread, pair):
    """What one that skipped a step does next would meet the step of another."""
    for said in pair.run(failing, "one skips", schedule, spread):
        assert said.startswith("PeerFailed") and "process 1 is at a step that is skipped" in said and said.endswith(" 2")
    assert pair.run(failing, "all skip", schedule, spread) == ["nothing 2"] * 2


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hook", "the communication hook 'fp16_compress_hook' of DistributedDataParallel changes gradients"),
        ("later-hook", "the communication hook 'fp16_compress_hook'"),
        ("no_sync", "gradients are not averaged over the 2 processes: the step's last forward pass ran under no_sync"),
        ("unwrapped", "or not through the DistributedDataParallel"),
    ],
)
def test_what_leaves_gradients_unaveraged_is_refused(what, message, pair):
    for said in pair.run(refused, what):
        assert message in said


def test_a_hook_that_averages_is_not_refused(pair):
    assert pair.run(averaging_hook) == [1, 1]


def test_validation_draws_the_same_everywhere(pair):
    (one, said, apart), (other, _, _) = pair.run(random_validation, True)
    assert one == other and len({x for (x,) in one}) == 3
    assert not said and apart == 0  # and the training's own stream is where it was


def test_validation_that_differs_is_told_of(pair):
    for _, said, _ in pair.run(random_validation, False):
        assert "say val_split=True" in said[0]
