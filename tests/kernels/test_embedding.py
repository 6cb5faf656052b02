"""An embedding's scores against their float64 definition, and that against autograd."""

import pytest
import torch
from kernel_checks import DEVICE, assert_accurate, dtypes, normal, ragged, wide
from torch.nn import functional as F

from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = {
    "odd": (3, 37, 33, 2),
    "one token": (5, 1, 32, 1),
    "one sample": (1, 9, 600, 3),
    "no sample": (0, 8, 16, 2),
    "no token": (2, 0, 16, 1),
}


def check(indices, b, P, padding_idx=None, offsets=None, per_token=False):
    def form(b, P):
        scores = definition.embedding_score(indices, b, P, padding_idx)
        return scores if per_token else definition.sum_samples(scores.to(torch.promote_types(scores.dtype, torch.float32)), offsets)

    got = ops.embedding_score(indices, b, P, padding_idx=padding_idx, offsets=offsets, per_token=per_token, impl="triton")
    assert_accurate(got, form(*wide(b, P)), form(b, P.to(b.dtype)), b.shape[-1] * (1 if per_token else b.shape[-2]))


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype):
    n, T, d, K = shape
    check(torch.randint(11, (n, T), device=DEVICE), normal(n, T, d, dtype=dtype), normal(K, 11, d), padding_idx=-2)


@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
def test_ragged(per_token):
    check(torch.randint(7, (13,), device=DEVICE), normal(13, 24), normal(2, 7, 24), offsets=ragged(5, 0, 8), per_token=per_token)


def test_views():
    check(torch.randint(7, (4, 3), device=DEVICE).mT, normal(4, 3, 48)[..., ::2].transpose(0, 1), normal(2, 24, 7).mT)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_definition_is_that_of_autograd(padding_idx):
    indices, b, P = torch.randint(5, (4, 6)), torch.randn(4, 6, 3).double(), torch.randn(1, 5, 3).double()
    indices[0, :2] = torch.tensor([0, 4])
    scores = definition.embedding_score(indices, b, P, padding_idx).sum(1)
    for i in range(4):
        weight = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
        (F.embedding(indices[i], weight, padding_idx) * b[i]).sum().backward()
        torch.testing.assert_close(scores[i, 0], (weight.grad * P[0]).sum())
