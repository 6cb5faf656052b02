"""What the tests of all kernels share: inputs, and the one rule of tolerance."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


def ragged(*lengths: int) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], device=DEVICE)


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.double() for x in tensors]


def assert_accurate(got: Tensor, exact: Tensor, eager: Tensor, length: int) -> None:
    """The error is at most the eager computation's in the inputs' dtype, plus ``length`` float32 roundings at random.

    Errors are root mean squares over all outputs: one output's error is a matter of luck, in both.
    """
    assert got.shape == exact.shape
    if got.numel() == 0:
        return
    assert not got.isnan().any(), "elements that were never written"
    eager = eager.double()
    assert eager.isfinite().all(), "inputs that the eager computation cannot take are no yardstick"
    bound = (eager - exact).norm() + math.sqrt(length) * torch.finfo(torch.float32).eps * exact.norm()
    assert (got.double() - exact).norm() <= bound
