"""The scores of LayerNorm and RMSNorm against their float64 definition, and that against autograd."""

import pytest
import torch
from kernel_checks import assert_accurate, dtypes, normal, ragged, wide
from torch.nn import functional as F

from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = {
    "odd": (3, 37, 33, 2),
    "one token": (5, 1, 32, 1),
    "one sample": (1, 9, 3000, 3),
    "no sample": (0, 8, 16, 2),
    "no token": (2, 0, 16, 1),
}
kinds = pytest.mark.parametrize("kind", ["layer", "rms"])


def check(x, b, P_weight, P_bias, kind, offsets=None, per_token=False, eps=1e-5):
    def form(x, b, P_weight, P_bias):
        scores = definition.norm_score(x, b, P_weight, P_bias, eps, kind)
        return scores if per_token else definition.sum_samples(scores.to(torch.promote_types(scores.dtype, torch.float32)), offsets)

    got = ops.norm_score(x, b, P_weight, P_bias, eps, kind, offsets=offsets, per_token=per_token, impl="triton")
    low = form(x, b, *(None if P is None else P.to(x.dtype) for P in (P_weight, P_bias)))
    assert_accurate(got, form(*wide(x, b, P_weight, P_bias)), low, x.shape[-1] * (1 if per_token else x.shape[-2]))


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, kind):
    n, T, d, K = shape
    check(normal(n, T, d, dtype=dtype), normal(n, T, d, dtype=dtype), normal(K, d), normal(K, d) if kind == "layer" else None, kind)


@kinds
def test_far_from_zero(kind):
    check(normal(2, 5, 64) + 30, normal(2, 5, 64), normal(2, 64), None, kind)


@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
def test_ragged(per_token):
    check(normal(13, 24), normal(13, 24), normal(2, 24), normal(2, 24), "layer", ragged(5, 0, 8), per_token)


def test_views():
    x, b = normal(40, 7, 3).permute(2, 1, 0), normal(7, 3, 80)[..., ::2].transpose(0, 1)
    check(x, b, normal(40, 2).mT, None, "rms")


@kinds
def test_definition_is_that_of_autograd(kind):
    x, b, P, P_bias = (torch.randn(*s).double() for s in ((4, 6, 5), (4, 6, 5), (1, 5), (1, 5)))
    P_bias = P_bias if kind == "layer" else None
    scores = definition.norm_score(x, b, P, P_bias, 1e-5, kind).sum(1)
    for i in range(4):
        weight, bias = (torch.ones(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
        out = F.layer_norm(x[i], (5,), weight, bias) if kind == "layer" else F.rms_norm(x[i], (5,), weight, 1e-5)
        (out * b[i]).sum().backward()
        exact = (weight.grad * P[0]).sum() + (0 if P_bias is None else (bias.grad * P_bias[0]).sum())
        torch.testing.assert_close(scores[i, 0], exact)
