"""The fixture of all kernels' tests."""

import math

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel should have written and did not is NaN."""
    empty = torch.empty

    def nan(*shape, **kwargs):
        out = empty(*shape, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", nan)
