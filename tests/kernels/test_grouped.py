"""The contraction of rows sorted by expert against its float64 definition."""

import pytest
import torch
from kernel_checks import DEVICE, assert_accurate, dtypes, normal, wide

from adam_ghost.kernels import grouped as kernel
from adam_ghost.scores import definition, ops

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = {  # rows of each expert, rows of nobody, d_in, d_out
    "odd": ((37, 0, 140, 1), 0, 33, 17),
    "aligned": ((128, 64, 192), 0, 64, 128),
    "rows of nobody": ((5, 9), 70, 40, 24),
    "one expert": ((3,), 0, 16, 272),
    "no rows": ((0, 0), 0, 16, 16),
}


def check(a, b, P, ends):
    got = ops.contract_grouped(a, b, P, ends, impl="triton")
    eager = definition.contract_grouped(a, b, P.to(a.dtype), ends)
    assert_accurate(got, definition.contract_grouped(*wide(a, b, P), ends), eager, a.shape[1] * b.shape[1])


def mixture(rows, nobody, d_in, d_out, dtype):
    ends = torch.tensor(rows, device=DEVICE).cumsum(0, dtype=torch.int32)
    N = sum(rows) + nobody
    return normal(N, d_in, dtype=dtype), normal(N, d_out, dtype=dtype, scale=1e-3), normal(len(rows), d_in, d_out), ends


@dtypes
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_sizes(sizes, dtype):
    a, b, P, ends = mixture(*sizes, dtype)
    check(a, b, P * 1e-6, ends)


def test_views():
    """Weights kept as ``[E, d_out, d_in]``, rows and gradients in other strides."""
    a, b, P, ends = mixture((30, 7, 50), 3, 40, 24, torch.bfloat16)
    check(a.t().contiguous().t(), normal(len(b), 48, dtype=torch.bfloat16)[:, ::2], P.mT.contiguous().mT, ends)


ALL = sorted({c for arch in (80, 90, 100, 120) for c in kernel.configs(arch, torch.bfloat16)})


@pytest.mark.parametrize("config", ALL, ids=str)
def test_configurations(config):
    a, b, P, ends = mixture((150, 3, 0, 260), 9, 72, 264, torch.bfloat16)
    exact = definition.contract_grouped(*wide(a, b, P.bfloat16()), ends)
    assert_accurate(kernel.contract_grouped(a, b, P, ends, config=config), exact, exact, 72 * 264)


def test_rows_of_nobody_have_no_score():
    a, b, P, ends = mixture((5, 9), 70, 40, 24, torch.bfloat16)
    scores = ops.contract_grouped(a, b, P, ends, impl="triton")
    assert bool(scores[:14].all()) and not bool(scores[14:].any())


def test_what_does_not_fit_is_named():
    a, b, P, ends = mixture((5, 9), 0, 40, 24, torch.float32)
    with pytest.raises(ValueError, match=r"P: expected \[1, 40, 24\], got \[2, 40, 24\]"):
        ops.contract_grouped(a, b, P, ends[:1])
    with pytest.raises(ValueError, match=r"b: expected \[14, 40\], got \[14, 24\]"):
        ops.contract_grouped(a, b, P.mT, ends)
    with pytest.raises(ValueError, match=r"ends: expected integers \[E\], got torch.float32 \[2\]"):
        ops.contract_grouped(a, b, P, ends.float())
