"""Where no GPU is visible, Triton kernels run under its interpreter: to be decided before anything imports triton."""

import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()


@pytest.fixture
def float64():
    """torch's optimizers count their steps, and correct the moments' bias, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def formed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lookahead small linear layers score in their gradient's product, as large ones do; not in tests marked ``together``."""
    if not request.node.get_closest_marker("together"):
        monkeypatch.setattr("adam_ghost.scores.together.SMALL", 0)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Each test has random numbers of its own, the same in any order of tests and whatever folder its file lies in."""
    torch.manual_seed(zlib.crc32(f"tests/{request.node.nodeid.rsplit('/', 1)[-1]}".encode()))
