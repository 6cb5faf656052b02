"""The compiled extension, if this installation has it, and otherwise the reason."""

import functools
from typing import Any

import torch  # noqa: F401  the extension finds libtorch in the process

from adam_ghost import checkout
from adam_ghost.warn import warn

C: Any = None
try:
    from adam_ghost import _C

    C, missing = _C, ""
except ImportError as error:
    # an extension that is there and does not load is a defect to report; one that was never built is a choice
    absent = "cannot import name '_C'" in str(error)
    hint = "pip install -e . --no-build-isolation" if checkout else "pip install --no-build-isolation, with a C++ compiler"
    missing = f"the extension was not built ({hint} builds it)" if absent else f"the extension does not load: {error}"

built = C.built() if C else {"cpu": "", "cuda": ""}


def reason(device: str) -> str:
    """Why the extension does not serve tensors on ``device``; empty where it does."""
    if device not in built:
        return f"no kernels for {device} tensors"
    if missing or built[device]:
        return missing
    return "the extension was built without CUDA"


@functools.cache
def warn_once(device: str) -> None:
    """Say that reference code stands in for the kernels; called on first use, not on import."""
    warn(f"{reason(device)}; slower reference code serves {device} tensors", RuntimeWarning)
