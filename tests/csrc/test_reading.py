"""Which tensors the extension takes, and that it reads them as what they are worth; the others it leaves to reference code."""

import pytest
import torch

from adam_ghost import extension
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import StepScalars

pytestmark = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")


def _inference():
    with torch.inference_mode():
        return torch.randn(6, 4)


class Subclass(torch.Tensor):
    pass


SERVED = {
    "plain": lambda: torch.randn(6, 4),
    "parameter": lambda: torch.nn.Parameter(torch.randn(6, 4)),
    "not a leaf": lambda: torch.randn(6, 4, requires_grad=True) * 2,
    "with an offset": lambda: torch.randn(8, 4)[2:],
    "transposed": lambda: torch.randn(4, 6).T,
    "strided": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(6, 1).expand(6, 4),
    "bfloat16": lambda: torch.randn(6, 4).bfloat16(),
    "no dimension": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 4),
    "seven dimensions": lambda: torch.randn(1, 2, 1, 2, 1, 3, 2),
    "inference": _inference,
    "zero": lambda: torch._efficientzerotensor(6, 4),
    "lazy copy": lambda: torch._lazy_clone(torch.randn(6, 4)),
}
LEFT = {
    "float64": lambda: torch.randn(6, 4).double(),
    "negated": lambda: torch._neg_view(torch.randn(6, 4)),
    "subclass": lambda: torch.randn(6, 4).as_subclass(Subclass),
}
STEP = StepScalars(3, 1e-3, 0.9, 0.999, 1e-8)


def correct(g, impl):
    w = torch.zeros(g.shape)
    return adam_op.variance_correction([w], [g], [None], [None], [None], [torch.ones(g.shape)], [STEP], impl=impl)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("make", [*SERVED.values(), *LEFT.values()], ids=[*SERVED, *LEFT])
def test_is_read_as_what_it_is_worth(make):
    torch.manual_seed(0)
    g = make().detach()
    P, sums = correct(g, "cpp" if make in SERVED.values() else None)
    plain = torch.empty(g.shape, dtype=torch.float64).copy_(g)
    exact = definition.direction("secant", STEP, torch.ones_like(plain), plain, plain, None, None)
    torch.testing.assert_close(P[0].double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.reached[0, 0], (exact * plain).sum(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_is_left_to_reference_code(make):
    with pytest.raises(TypeError, match="impl='cpp': "):
        correct(make(), "cpp")


def test_what_has_no_memory_is_refused():
    w, table, sums = torch.zeros(6, 4), torch.tensor([STEP], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    for g in (3.0, torch.zeros(6, 4).to_sparse(), torch.zeros(6, 4, device="meta")):
        status = extension.C.variance_correction([w], [g], [], [], [], [w], [w.clone()], table, [0], 0, False, sums)
        assert status == adam_op._NOT_PLAIN
