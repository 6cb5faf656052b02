"""Number, order and size of what a step exchanges: as docs/processes.md counts it."""

import pytest
from faults import exchanges
from loops import Net

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


EXPECTED = {
    ("ddp", "midpoint", False): [*COVERED, *END],
    ("ddp", "midpoint", True): [*COVERED, *MEAN, *END],
    ("ddp", "lookahead", False): [AGREE, AGREE, *COVERED, *END],
    ("ddp", "lookahead", True): [AGREE, *MEAN, AGREE, *COVERED, *END],
    ("fsdp", "midpoint", False): [*COVERED, AGREE, WORDS, *SCALES, *sums(2), *units(AGREE), *END],
    ("fsdp", "lookahead", False): [AGREE, *sums(2), AGREE, *units(), *COVERED, AGREE, WORDS, *SCALES, *sums(1), *END],
}


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{case[0]}-{case[1]}-{'split' if case[2] else 'alike'}")
def test_a_step_exchanges(case, pair):
    for made in pair.run(exchanges, *case):
        assert made == EXPECTED[case]
