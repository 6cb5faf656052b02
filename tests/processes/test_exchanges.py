"""Number, order and size of what a step exchanges: as docs/processes.md counts it."""

import pytest
from faults import exchanges, exchanges_of_training
from loops import UNEVEN, WITH_NONE, Net

from adam_ghost.processes.shards import GATHER

AGREE = ("all_reduce", 12)
WORDS = ("all_reduce", len(list(Net().parameters())))  # a byte for each parameter
JOINED = ("all_reduce", 4 * 8)  # samples, sum, squares and validation loss, of one target
SIZES = {name: p.numel() * 8 for name, p in Net().named_parameters()}
EVERYTHING = sum(SIZES.values())


def gathered(inside):
    """Bytes of one unit's directions in all processes: the parts of two, filled up to the longer."""
    shapes = [p.shape for name, p in Net().named_parameters() if name.startswith("block.") == inside]
    longer = sum(-(-shape[0] // 2) * shape[1:].numel() for shape in shapes)
    return (GATHER, 2 * 8 * longer)


COVERED = [AGREE, WORDS, AGREE, WORDS]  # which parameters calls explain, and which of these only in part
MEAN = [AGREE, ("all_reduce", EVERYTHING + 8)]  # of the validation gradients, with the loss
END = [AGREE, JOINED, AGREE]
SCALES = [AGREE, ("all_reduce", 4 * WORDS[1] * 8)]  # two norms of every gradient, before and after clipping


def sums(numbers):
    """Over the whole parameters, of what each process has of a few numbers."""
    return [AGREE, ("all_reduce", 8 * numbers)]


def units(*word):
    """The root's directions, then the block's: on their way while the former are contracted, or with the weights."""
    return [*word, gathered(False), *word, gathered(True)]


# a window of two steps and one ahead, swept by the next: every process's samples, the kept states' ends
SAMPLES = [AGREE, ("all_gather_object", 0)]
LOOK = [AGREE, ("all_gather_object", 0)]  # whether the loss has kinks
FEEDBACK = [AGREE, ("all_reduce", EVERYTHING)]  # the mean of the gradients at moved weights
FEEDBACK_PARTS = [*sums(3), *sums(1)]  # the norms of vector, weights and gradient, and of the gradient's change
SMALL = [AGREE, ("all_reduce", sum(sorted(SIZES.values())[:3]))]  # gradients that tell whether a batch runs as it did
SWEPT = [*SMALL, *COVERED]
SWEPT_PARTS = [*sums(len(SIZES)), *units(), *SMALL, *sums(2), *COVERED, AGREE, WORDS, *sums(1)]
BOOKED = [AGREE, JOINED, AGREE, JOINED, AGREE]

EXPECTED = {
    ("ddp", "midpoint", False): [*COVERED, *END],
    ("ddp", "midpoint", True): [*COVERED, *MEAN, *END],
    ("ddp", "lookahead", False): [AGREE, AGREE, *COVERED, *END],
    ("ddp", "lookahead", True): [AGREE, *MEAN, AGREE, *COVERED, *END],
    ("fsdp", "midpoint", False): [*COVERED, AGREE, WORDS, *SCALES, *sums(2), *units(AGREE), *END],
    ("fsdp", "lookahead", False): [AGREE, *sums(2), AGREE, *units(), *COVERED, AGREE, WORDS, *SCALES, *sums(1), *END],
    ("ddp", "window", False): [
        *[AGREE, *SAMPLES, AGREE],
        *[*LOOK, *FEEDBACK, AGREE, *SWEPT, *FEEDBACK, *SWEPT],
        *BOOKED,
    ],
    ("fsdp", "window", False): [
        *[*SCALES, AGREE, *sums(3), *SAMPLES, AGREE],
        *[*sums(len(SIZES)), *FEEDBACK_PARTS, AGREE, *SWEPT_PARTS, *FEEDBACK_PARTS, *SWEPT_PARTS],
        *BOOKED,
    ],
}


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{case[0]}-{case[1]}-{'split' if case[2] else 'alike'}")
def test_a_step_exchanges(case, pair):
    for made in pair.run(exchanges, *case):
        assert made == EXPECTED[case]


@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "case",
    [
        {"schedule": "midpoint", "sizes": WITH_NONE, "steps": 3},
        {"schedule": "lookahead", "sizes": UNEVEN, "micro": 2, "warm": True, "steps": 3},
        {"schedule": "window", "sizes": UNEVEN, "micro": 2, "clip": 0.05, "steps": 6},
        {"schedule": "window", "sizes": WITH_NONE, "options": {"feedback": "gauss-newton"}, "steps": 6},
    ],
    ids=["midpoint", "lookahead", "window", "window-none"],
)
def test_processes_exchange_the_same_whatever_their_batches_hold(spread, case, pair):
    one, other = pair.run(exchanges_of_training, spread, case)
    assert len(one) > 20 and one == other
