"""The ops as PyTorch sees them: schemas and fakes, whole-graph compilation, dispatch, errors; and the cost model."""

import pytest
import torch
from kernel_checks import DEVICE, normal, ragged
from torch.library import opcheck

from adam_ghost.scores import cost, ops

a, b, P = normal(3, 6, 8), normal(3, 6, 4), normal(2, 4, 8)
flat, offsets = (a.flatten(0, 1), b.flatten(0, 1)), ragged(5, 0, 13)
indices = torch.randint(5, (3, 6), device=DEVICE)
IMPLS = [None, "triton", "reference"]
CALLS = {
    "contract": lambda impl: (a, b, P, normal(2, 4), None, False, False, impl),
    "contract ragged": lambda impl: (*flat, P, None, offsets, False, False, impl),
    "contract per_token": lambda impl: (a, b, P, None, None, True, False, impl),
    "wgrad_score": lambda impl: (a, b, P, None, impl),
    "wgrad_score ragged": lambda impl: (*flat, P, offsets, impl),
    "ghost_gram": lambda impl: (a, b, a[:2], b[:2], normal(4), normal(8), None, None, impl),
    "ghost_gram one set": lambda impl: (*flat, None, None, None, None, offsets, None, impl),
    "embedding_score": lambda impl: (indices, a, normal(2, 5, 8), 1, None, False, impl),
    "norm_score": lambda impl: (a, a, normal(2, 8), normal(2, 8), 1e-5, "layer", None, True, impl),
}
calls = pytest.mark.parametrize("name", CALLS)
impls = pytest.mark.parametrize("impl", IMPLS)


def op(name):
    return getattr(torch.ops.adam_ghost, name.split()[0]).default


@impls
@calls
def test_opcheck(name, impl):
    opcheck(op(name), CALLS[name](impl))


PUBLIC = {
    "contract": lambda impl: ops.contract(a, b, P, impl=impl),
    "wgrad_score": lambda impl: ops.wgrad_score(a, b, P, impl=impl),
    "ghost_gram": lambda impl: ops.ghost_gram(a, b, row=P[0, :, 0], impl=impl),
    "embedding_score": lambda impl: ops.embedding_score(indices, a, P.mT[..., :1].expand(2, 8, 8), padding_idx=0, impl=impl),
    "norm_score": lambda impl: ops.norm_score(a, a, P[:, 0], None, None, "rms", impl=impl),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_whole(name):
    torch._dynamo.reset()
    for impl in IMPLS:
        plain = PUBLIC[name](impl)
        torch.testing.assert_close(torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager")(impl), plain)
    torch.testing.assert_close(PUBLIC[name]("triton"), PUBLIC[name]("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.contract(a, b[:2], P), r"b: expected the tokens of a, \[3, 6\], got \[2, 6\]"),
        (lambda: ops.contract(a[0], b, P), r"a: expected \[n, T, d\], got \[6, 8\]"),
        (lambda: ops.contract(a, b, P.mT), r"P: expected \[K, 4, 8\], got \[2, 8, 4\]"),
        (lambda: ops.contract(a, b, P, offsets=offsets), r"a: expected \[N, d\] with offsets, got \[3, 6, 8\]"),
        (lambda: ops.contract(*flat, P, offsets=offsets.float()), "offsets: expected integers"),
        (lambda: ops.contract(a, b, P, impl="cuda"), "impl: expected None, 'triton', 'cpp' or 'reference', got 'cuda'"),
        (lambda: ops.ghost_gram(a, b, a2=a), "b2: expected both a2 and b2"),
        (lambda: ops.ghost_gram(a, b, row=normal(8)), r"row: expected \[4\], got \[8\]"),
        (lambda: ops.ghost_gram(a, b, offsets2=offsets), "offsets2: expected None"),
        (lambda: ops.embedding_score(indices[:, :2], a, P), r"indices: expected \[3, 6\], got \[3, 2\]"),
        (lambda: ops.norm_score(a, a, P[:, 0], None, 1e-5, "batch"), "kind: expected 'layer' or 'rms', got 'batch'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_implementation_that_is_not_there():
    with pytest.raises(RuntimeError, match="impl='triton': contract takes float32, bfloat16 and float16"):
        ops.contract(a.double(), b.double(), P.double(), impl="triton")
    with pytest.raises(RuntimeError, match="impl='cpp': the extension has no contract"):
        ops.contract(a, b, P, impl="cpp")
    assert ops.contract(a.double(), b.double(), P.double()).dtype == torch.float64


def test_cost_model():
    # many tokens per sample: the product that backward needs anyway carries the scores; one token: contraction
    assert cost.scores(16, 1024, 1, 3072, 768).best == "weight gradient"
    assert cost.scores(4096, 1, 1, 1024, 1024).best == "contraction"
    assert cost.scores(16, 1024, 1, 3072, 768, gradient=False).best == "contraction"
    slow = cost.H200._replace(matrix_flops=79e12)
    assert (
        cost.scores(16, 1024, 1, 3072, 768, machine=slow).seconds["contraction"]
        > 9 * cost.scores(16, 1024, 1, 3072, 768).seconds["contraction"]
    )
