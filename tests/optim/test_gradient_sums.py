"""Norms of gradients and their products with directions: the extension's against plain sums in float64."""

import pytest
import torch

from adam_ghost import extension
from adam_ghost.optim.gradient_sums import gradient_sums

SHAPES = [(3, 5), (), (0,), (40_000,), (513,), (2, 3, 4)]  # several chunks, several tiles and an odd end among them
IMPLS = ["reference", *(["cpp"] if extension.built["cpu"] else [])]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [0, 1, 3])
def test_sums(K, dtype, impl):
    torch.manual_seed(K)
    grads = [torch.randn(shape).to(dtype) for shape in SHAPES]
    along = [torch.randn(K, *shape) for shape in SHAPES] if K else []
    found = gradient_sums(grads, along, impl)
    # a sum of n rounded products is off by at most n roundings; in float64 by next to none
    eps = torch.finfo(torch.float32 if impl == "reference" else torch.float64).eps
    for i, g in enumerate(grads):
        g, size = g.double().flatten(), eps * (g.numel() + 1)
        assert abs(found.l1[i] - g.abs().sum()) <= size * g.abs().sum()
        assert abs(found.l2[i] - g.norm()) <= size * g.norm()
        for k in range(K):
            terms = along[i][k].double().flatten() * g
            assert abs(found.reached[i, k] - terms.sum()) <= size * terms.abs().sum()
    assert found.reached.shape == (len(SHAPES), K)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_shows(impl):
    spoiled = [torch.ones(600), torch.ones(600).index_fill_(0, torch.tensor([599]), float("nan")), torch.full((2,), float("inf"))]
    assert gradient_sums(spoiled, impl=impl).l1.isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_views_and_other_layouts(impl):
    g, P = torch.randn(6, 8), torch.randn(1, 6, 8)
    plain = gradient_sums([g], [P], impl)
    for other in (g.t().contiguous().t(), torch.stack([g, g], -1)[..., 0]):
        assert torch.allclose(gradient_sums([other], [P], impl).reached, plain.reached)


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"along\[0\]: expected shape \[1, 3\], got \[1, 4\]"):
        gradient_sums([torch.ones(3)], [torch.ones(1, 4)])
