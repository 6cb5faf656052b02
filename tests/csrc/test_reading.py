"""How the extension reads tensors: in place and through the exchange it sees the same, and takes and refuses the same."""

import pytest
import torch

from adam_ghost import extension
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import StepScalars

pytestmark = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")


def _inference():
    with torch.inference_mode():
        return torch.randn(6, 4)


class Subclass(torch.Tensor):
    pass


TENSORS = {
    "plain": lambda: torch.randn(6, 4),
    "parameter": lambda: torch.nn.Parameter(torch.randn(6, 4)),
    "not a leaf": lambda: torch.randn(6, 4, requires_grad=True) * 2,
    "with an offset": lambda: torch.randn(8, 4)[2:],
    "transposed": lambda: torch.randn(4, 6).T,
    "strided": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(6, 1).expand(6, 4),
    "bfloat16": lambda: torch.randn(6, 4).bfloat16(),
    "float64": lambda: torch.randn(6, 4).double(),
    "no dimension": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "seven dimensions": lambda: torch.randn(1, 2, 1, 2, 1, 3, 2),
    "inference": _inference,
    "negated": lambda: torch._neg_view(torch.randn(6, 4)),
    "zero": lambda: torch._efficientzerotensor(6, 4),
    "lazy copy": lambda: torch._lazy_clone(torch.randn(6, 4)),
    "subclass": lambda: torch.randn(6, 4).as_subclass(Subclass),
    "sparse": lambda: torch.randn(6, 4).to_sparse(),
    "meta": lambda: torch.randn(6, 4, device="meta"),
    "no tensor": lambda: 3.0,
}


@pytest.fixture
def in_place():
    yield extension.C.read_in_place
    extension.C.read_in_place(True)


def test_reads_in_place_with_the_torch_that_it_was_compiled_for(in_place):
    assert in_place(True)
    assert not in_place(False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS.keys())
def test_both_ways_see_the_same(in_place, make):
    torch.manual_seed(0)
    g = make()
    w = torch.randn(g.shape if isinstance(g, torch.Tensor) else (2, 2))
    found = []
    for way in (True, False):
        in_place(way)
        P, sums = torch.zeros_like(w), torch.zeros(1, 5, dtype=torch.float64)
        step = StepScalars(3, 1e-3, 0.9, 0.999, 1e-8)
        status = extension.C.variance_correction([w], [g], [], [], [], [torch.ones_like(w)], [g], [P], [step], [], 0, sums)
        found.append((status, P, sums))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("way", [True, False])
def test_negated_view_is_read_as_what_it_is_worth(in_place, way):
    in_place(way)
    w, g = torch.zeros(4), torch.randn(4)
    sums = []
    for x in (torch._neg_view(g), -g):
        step = StepScalars(3, 1e-3, 0.9, 0.999, 1e-8)
        sums.append(adam_op.variance_correction([w], [x], [None], [None], [None], [torch.ones_like(w)], [step]).sums.table)
    torch.testing.assert_close(*sums)
