"""Number, order and size of what a step exchanges: as docs/processes.md counts it."""

import pytest
from faults import exchanges
from loops import Net

AGREE = ("all_reduce", 4)
WORDS = ("all_reduce", len(list(Net().parameters())))  # a byte for each parameter
JOINED = ("all_reduce", 4 * 8)  # samples, sum, squares and validation loss, of one target
SIZES = {name: p.numel() * 8 for name, p in Net().named_parameters()}
EVERYTHING = sum(SIZES.values())


def gathered(inside):
    """Bytes of one unit's directions in all processes: the parts of two, filled up to the longer."""
    shapes = [p.shape for name, p in Net().named_parameters() if name.startswith("block.") == inside]
    longer = sum(-(-shape[0] // 2) * shape[1:].numel() for shape in shapes)
    return ("all_gather_into_tensor", 2 * 8 * longer)


COVERED = [AGREE, WORDS, AGREE, WORDS]  # which parameters calls explain, and which of these only in part
MEAN = [AGREE, ("all_reduce", EVERYTHING + 8)]  # of the validation gradients, with the loss
END = [AGREE, JOINED, AGREE]
SCALES = [AGREE, ("all_reduce", 4 * WORDS[1] * 8)]  # two norms of every gradient, before and after clipping
GATHERED = [AGREE, gathered(False), AGREE, gathered(True)]  # the second on its way while the first is contracted

EXPECTED = {
    ("ddp", "midpoint", False): [*COVERED, *END],
    ("ddp", "midpoint", True): [*COVERED, *MEAN, *END],
    ("ddp", "lookahead", False): [AGREE, *COVERED, *END],
    ("ddp", "lookahead", True): [*MEAN, AGREE, *COVERED, *END],
    ("fsdp", "midpoint", False): [*COVERED, AGREE, WORDS, *SCALES, AGREE, ("all_reduce", 2 * 8), *GATHERED, *END],
}


@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: f"{case[0]}-{case[1]}-{'split' if case[2] else 'alike'}")
def test_a_step_exchanges(case, pair):
    for made in pair.run(exchanges, *case):
        assert made == EXPECTED[case]
