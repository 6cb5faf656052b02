"""The weight gradient with scores against its float64 definition."""

import pytest
import torch
from kernel_checks import DEVICE, assert_accurate, dtypes, normal, ragged, wide

from adam_ghost.kernels import wgrad_score as kernel
from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SHAPES = {  # n, T, d_in, d_out, K
    "odd": (3, 37, 33, 17, 5),
    "aligned": (8, 96, 264, 136, 1),
    "targets": (4, 40, 64, 40, 5),
    "one token": (15, 1, 64, 32, 1),
    "one sample": (1, 70, 48, 72, 12),
    "long sample": (1, 1024, 16, 16, 12),
    "no sample": (0, 8, 16, 16, 2),
    "no token": (4, 0, 16, 16, 1),
}


def check(a, b, P, offsets=None, run=None):
    exact_G, exact = definition.wgrad_score(*wide(a, b, P), offsets)
    low_G = (b.flatten(0, -2).mT @ a.flatten(0, -2)).double()
    low = definition.contract(a, b, P.to(a.dtype))
    low = definition.sum_samples(low.float(), offsets)
    G, scores = (run or (lambda: ops.wgrad_score(a, b, P, offsets=offsets, impl="triton")))()
    N = a.flatten(0, -2).shape[0]
    assert_accurate(G, exact_G, low_G, max(N, 1))
    assert_accurate(scores, exact, low, max(N, 1) * a.shape[-1] * b.shape[-1])


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype):
    n, T, d_in, d_out, K = shape
    check(normal(n, T, d_in, dtype=dtype), normal(n, T, d_out, dtype=dtype, scale=1e-3), normal(K, d_out, d_in, scale=1e-6))


def test_programs_that_hold_whole_tiles():
    a, b = normal(1, 40, 520, dtype=torch.bfloat16), normal(1, 40, 136, dtype=torch.bfloat16)
    check(a, b, normal(8, 136, 520))


@pytest.mark.parametrize("lengths", [(5, 0, 140, 1), (7,), ()], ids=["four", "one", "none"])
def test_ragged(lengths):
    N = sum(lengths)
    dtype = torch.bfloat16
    check(normal(N, 40, dtype=dtype), normal(N, 72, dtype=dtype), normal(8, 72, 40), ragged(*lengths))


@pytest.mark.skipif(DEVICE == "cuda", reason="a launch is as many programs as there are multiprocessors")
@pytest.mark.parametrize("lengths", [None, (70, 0, 33, 5, 200)], ids=["equal", "ragged"])
@pytest.mark.parametrize("programs", [1, 2, 7, 31])
def test_any_number_of_programs(programs, lengths, monkeypatch):
    """However the work is shared out, and wherever each program begins."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda x: programs)
    tokens = (4, 77) if lengths is None else (sum(lengths),)
    a, b = (normal(*tokens, d, dtype=torch.bfloat16) for d in (136, 328))
    offsets = None if lengths is None else ragged(*lengths)
    config = kernel.Config(64, 64, 32, 4, 3, True, True)
    P = normal(1, 328, 136, dtype=torch.bfloat16)
    check(a, b, P, offsets, run=lambda: kernel.wgrad_score(a, b, P, offsets, config=config))


def test_views():
    a = normal(40, 37, 3).permute(2, 1, 0)
    b = normal(37, 3, 48)[..., ::2].transpose(0, 1)
    check(a, b, normal(8, 40, 24).mT)


ALL = sorted({c for arch in (80, 90, 100, 120) for able in (True, False) for c in kernel.configs(arch, torch.bfloat16, able)})


@pytest.mark.skipif(DEVICE == "cuda", reason="some are meant for another chip")
@pytest.mark.parametrize("config", ALL, ids=str)
def test_configurations(config):
    a, b, P = (normal(*s, dtype=torch.bfloat16) for s in ((5, 70, 264), (5, 70, 136), (1, 136, 264)))
    check(a, b, P, run=lambda: kernel.wgrad_score(a, b, P, config=config))


def test_prefixes_do_not_drown_a_small_sample():
    """After loud samples a quiet one's score keeps the accuracy of the sum, in float32 its own."""
    a, b, P = normal(8, 64, 64), normal(8, 64, 64), normal(1, 64, 64)
    b[-1] *= 1e-5
    scores = ops.wgrad_score(a, b, P, impl="triton")[1][-1]
    exact = definition.wgrad_score(*wide(a, b, P))[1][-1]
    assert (scores.double() - exact).abs() <= 1e-4 * exact.abs() + 1e-7 * exact.abs().max()


def test_same_bits_twice():
    a, b, P = normal(5, 65, 40), normal(5, 65, 24), normal(1, 24, 40)
    for one, two in zip(*(ops.wgrad_score(a, b, P, impl="triton") for _ in range(2)), strict=True):
        assert torch.equal(one, two)
