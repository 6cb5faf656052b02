"""The ghost Gram against its float64 definition, and that against per-sample gradients."""

import pytest
import torch
from kernel_checks import DEVICE, assert_accurate, dtypes, normal, ragged, wide

from adam_ghost.kernels import ghost_gram as kernel
from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = {  # n, T, m, U, d_in, d_out
    "odd": (3, 37, 2, 5, 33, 17),
    "long": (2, 150, 3, 130, 72, 40),
    "one token": (70, 1, 9, 1, 16, 24),
    "one sample": (1, 200, 1, 20, 32, 16),
    "no sample": (0, 8, 3, 8, 16, 16),
    "no token": (4, 0, 2, 3, 16, 16),
}


def sides(n, T, d_in, d_out, dtype):
    return normal(n, T, d_in, dtype=dtype), normal(n, T, d_out, dtype=dtype, scale=1e-2)


def check(first, second=None, row=None, col=None, offsets=None, offsets2=None, run=None):
    other, theirs = (first, offsets) if second is None else (second, offsets2)
    exact = definition.ghost_gram(*wide(*first, *other, row, col), offsets, theirs)
    # an eager float16 user would have to bring the scales to its range
    largest = [1.0 if x is None else x.max() for x in (row, col)]
    low = [None if x is None else (x / s).to(first[0].dtype) for x, s in zip((row, col), largest, strict=True)]
    eager = definition.ghost_gram(*first, *other, *low, offsets, theirs).double() * largest[0] * largest[1]
    call = run or ops.ghost_gram
    options = {} if run else {"impl": "triton"}
    got = call(*first, *(second or (None, None)), row=row, col=col, offsets=offsets, offsets2=offsets2, **options)
    tokens = [max(x.shape[0] if o is not None else x.shape[1], 1) for x, o in ((first[0], offsets), (other[0], theirs))]
    assert_accurate(got, exact, eager, tokens[0] * tokens[1] * first[0].shape[-1] * first[1].shape[-1])
    return got


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_two_sets(shape, dtype):
    n, T, m, U, d_in, d_out = shape
    row, col = normal(d_out).exp() * 1e6, normal(d_in).exp()  # of the size of 1 / (sqrt(v) + eps)
    check(sides(n, T, d_in, d_out, dtype), sides(m, U, d_in, d_out, dtype), row, col)


@pytest.mark.parametrize("T", [1, 3, 64, 200])
def test_one_set(T):
    got = check(sides(9, T, 40, 24, torch.bfloat16), row=normal(24).exp())
    assert torch.equal(got, got.mT)


def test_ragged():
    dtype = torch.bfloat16
    x, y = ((normal(N, 40, dtype=dtype), normal(N, 24, dtype=dtype)) for N in (146, 9))
    check(x, y, col=normal(40).exp(), offsets=ragged(5, 0, 140, 1), offsets2=ragged(2, 7))
    got = check(x, offsets=ragged(5, 0, 140, 1))
    assert torch.equal(got, got.mT)


def test_ragged_against_equal_samples():
    dtype = torch.bfloat16
    check((normal(146, 40, dtype=dtype), normal(146, 24, dtype=dtype)), sides(3, 9, 40, 24, dtype), offsets=ragged(5, 140, 1))


def test_views():
    a, b = normal(40, 37, 3).permute(2, 1, 0), normal(37, 3, 48)[..., ::2].transpose(0, 1)
    check((a, b), (a[:, ::2], b[:, ::2]))


ALL = sorted({kernel.choose(arch, torch.bfloat16, able) for arch in (80, 90, 100, 120) for able in (True, False)})


@pytest.mark.skipif(DEVICE == "cuda", reason="some are meant for another chip")
@pytest.mark.parametrize("T", [8, 140])
@pytest.mark.parametrize("config", ALL, ids=str)
def test_configurations(config, T):
    x = sides(3, T, 72, 40, torch.bfloat16)
    check(x, col=normal(72).exp(), run=lambda a, b, a2, b2, **k: kernel.ghost_gram(a, b, a2, b2, **k, config=config))


def test_definition_is_that_of_per_sample_gradients():
    (a, b), (a2, b2) = (wide(*sides(n, T, 5, 4, torch.float32)) for n, T in ((3, 7), (2, 6)))
    D = torch.outer(row := normal(4).double().exp(), col := normal(5).double().exp())
    exact = torch.einsum("noi,oi,moi->nm", b.mT @ a, D, b2.mT @ a2)
    torch.testing.assert_close(definition.ghost_gram(a, b, a2, b2, row, col), exact)
