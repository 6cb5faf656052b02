"""The fused contraction against its float64 definition."""

import pytest
import torch
from kernel_checks import DEVICE, assert_accurate, dtypes, normal, ragged, wide

from adam_ghost.kernels import contract as kernel
from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = {  # n, T, d_in, d_out, K
    "odd": (3, 37, 33, 17, 5),
    "aligned": (8, 40, 136, 264, 1),
    "one token": (15, 1, 64, 32, 1),
    "one sample": (1, 70, 48, 72, 12),
    "no sample": (0, 8, 16, 16, 2),
    "no token": (4, 0, 16, 16, 1),
}


def check(a, b, P, offsets=None, **options):
    per_token = options.get("per_token", False)

    def form(a, b, P):
        scores = definition.contract(a, b, P)
        return scores if per_token else definition.sum_samples(scores.float() if scores.dtype != torch.float64 else scores, offsets)

    got = ops.contract(a, b, P, offsets=offsets, impl="triton", **options)
    tokens = 1 if per_token else a.shape[-2]
    assert_accurate(got, form(*wide(a, b, P)), form(a, b, P.to(a.dtype)), tokens * a.shape[-1] * b.shape[-1])


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype):
    n, T, d_in, d_out, K = shape
    check(normal(n, T, d_in, dtype=dtype), normal(n, T, d_out, dtype=dtype, scale=1e-3), normal(K, d_out, d_in, scale=1e-6))


@dtypes
def test_per_token(dtype):
    check(normal(2, 37, 40, dtype=dtype), normal(2, 37, 24, dtype=dtype), normal(2, 24, 40), per_token=True)


@pytest.mark.parametrize("lengths", [(5, 0, 140, 1), (7,), ()], ids=["four", "one", "none"])
@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
def test_ragged(lengths, per_token):
    N = sum(lengths)
    dtype = torch.bfloat16
    a, b = normal(N, 40, dtype=dtype), normal(N, 24, dtype=dtype)
    check(a, b, normal(8, 24, 40), ragged(*lengths), per_token=per_token)


def test_views():
    a = normal(40, 37, 3).permute(2, 1, 0)
    b = normal(37, 3, 48)[..., ::2].transpose(0, 1)
    check(a, b, normal(8, 40, 24).mT)


ALL = sorted({c for arch in (80, 90, 100, 120) for able in (True, False) for c in kernel.configs(arch, torch.bfloat16, able)})


@pytest.mark.skipif(DEVICE == "cuda", reason="some are meant for another chip")
@pytest.mark.parametrize("config", ALL, ids=str)
def test_configurations(config):
    a, b, P = (normal(*s, dtype=torch.bfloat16) for s in ((1, 150, 72), (1, 150, 264), (2, 264, 72)))
    got = kernel.contract(a, b, P, config=config)
    exact = definition.contract(*wide(a, b, P)).sum(1)
    assert_accurate(got, exact, exact, 150 * 72 * 264)


def test_same_bits_twice():
    a, b, P = normal(3, 65, 40), normal(3, 65, 24), normal(1, 24, 40)
    assert torch.equal(ops.contract(a, b, P, impl="triton"), ops.contract(a, b, P, impl="triton"))


def test_past_two_to_the_31():
    a = torch.empty(2**31 + 64, dtype=torch.float16, device="meta")
    assert ops.contract(a.view(2, -1, 32), a.view(2, -1, 32), torch.empty(1, 32, 32, device="meta")).shape == (2, 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter copies the buffer")
def test_samples_far_apart():
    a = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 16, 32), (2**31, 32, 1))
    a.copy_(normal(2, 16, 32))
    check(a, normal(2, 16, 24, dtype=torch.bfloat16), normal(8, 24, 32))
