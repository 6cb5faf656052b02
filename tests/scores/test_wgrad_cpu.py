"""wgrad_score on CPU against the float64 reference: every order of evaluation, ragged and equal samples, bounded memory."""

import math
from itertools import pairwise

import pytest
import torch

from adam_ghost.scores import cpu, definition
from adam_ghost.scores.cpu import wgrad_score

EPS = torch.finfo(torch.float32).eps
SHAPES = [  # n, T, d_in, d_out, K
    (4, 33, 24, 40, 1),
    (5, 1, 16, 8, 2),
    (1, 65, 7, 3, 3),
    (3, 17, 1, 1, 1),
    (0, 20, 8, 8, 1),
    (9, 16, 12, 20, 2),
]
shapes = pytest.mark.parametrize("n, T, d_in, d_out, K", SHAPES, ids=lambda x: str(x))


@pytest.fixture(autouse=True, params=[1 << 62, 0], ids=["in-blocks", "one-by-one"])
def alone(request, monkeypatch):
    monkeypatch.setattr(cpu, "ALONE", request.param)


def draw(n, T, d_in, d_out, K, dtype=torch.float32):
    r = torch.Generator().manual_seed(n + T)
    return [
        torch.randn(shape, generator=r, dtype=torch.float64).to(dtype) for shape in ((n, T, d_in), (n, T, d_out), (K, d_out, d_in))
    ]


def assert_as_good(got, exact, magnitude, length, unit):
    """Within the rounding of a sum of so many terms, relative to the terms' magnitude."""
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= unit * math.sqrt(length + 1) * magnitude + 1e-30).all()


def check(got, a, b, P, grad_unit=EPS):
    exact = definition.wgrad_score(a.double(), b.double(), P.double())
    size = definition.wgrad_score(*(x.double().abs() for x in (a, b, P)))
    assert_as_good(got[0], exact[0], size[0], a.shape[0] * a.shape[1], grad_unit)
    assert_as_good(got[1], exact[1], size[1], a.shape[1] * P[0].numel(), EPS)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block_bytes", [0, 10_000, 1 << 26])
def test_matches_float64(n, T, d_in, d_out, K, dtype, block_bytes):
    a, b, P = draw(n, T, d_in, d_out, K, dtype)
    got = wgrad_score(a, b, P, block_bytes=block_bytes)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    check(got, a, b, P, torch.finfo(dtype).eps)


@pytest.mark.parametrize("lengths", [[3, 0, 40, 1, 61], [5], [1] * 9, [20, 20, 20], [0, 0]], ids=str)
@pytest.mark.parametrize("margin", [0, 2], ids=["all-rows", "rows-of-no-sample"])
def test_ragged(lengths, margin):
    a, b, P = (x[0] if x.ndim == 3 and i < 2 else x for i, x in enumerate(draw(1, sum(lengths) + 2 * margin, 12, 18, 2)))
    offsets = torch.tensor([margin, *lengths]).cumsum(0)
    grad, scores = wgrad_score(a, b, P, offsets=offsets)
    inside = slice(margin, margin + sum(lengths))
    check((grad, scores.sum(0, keepdim=True)), a[None, inside], b[None, inside], P)
    for score, (begin, end) in zip(scores, pairwise(offsets), strict=True):
        x, y = a[None, begin:end], b[None, begin:end]
        check((definition.wgrad_score(x, y, P)[0], score[None]), x, y, P)


@pytest.mark.parametrize("T", [4, 40])
def test_takes_views(T):
    a, b, P = draw(6, T, 10, 14, 1)
    want, scores = wgrad_score(a, b, P)
    got = wgrad_score(a.mT.contiguous().mT, b[:, :, None].expand(-1, -1, 2, -1)[:, :, 1], P.mT.contiguous().mT)
    torch.testing.assert_close(got[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], scores, rtol=1e-5, atol=1e-5)


def test_holds_no_more_than_a_block(monkeypatch):
    monkeypatch.setattr(cpu, "ALONE", 1 << 62)
    a, b, P = draw(32, 20, 16, 16, 1)
    held = []
    product = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y, out: held.append(out.numel()) or product(x, y, out=out))
    wgrad_score(a, b, P, block_bytes=3 * 16 * 16 * 4)
    assert max(held) == 3 * 16 * 16 and sum(held) == 32 * 16 * 16
