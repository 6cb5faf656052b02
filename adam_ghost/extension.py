"""The compiled extension, if this installation has it, and otherwise the reason."""

import functools
from typing import Any

import torch  # the extension finds libtorch in the process

from adam_ghost import checkout
from adam_ghost.warn import warn

C: Any = None
try:
    from adam_ghost import _C

    C, missing = _C, ""
except ImportError as error:
    # an extension that is there and does not load is a defect to report; one that was never built is a choice
    absent = "cannot import name '_C'" in str(error)
    how = f"pip install -e '{checkout}'" if checkout else "installing again"
    not_built = f"the extension was not built ({how} builds it where there is a C++ compiler)"
    missing = not_built if absent else f"the extension does not load: {error}"

built = C.built() if C else {"cpu": "", "cuda": "", "cpu_bfloat16": ""}


def reason(device: str) -> str:
    """Why the extension does not serve tensors on ``device``; empty where it does."""
    if device not in built:
        return f"no kernels for {device} tensors"
    if missing:
        return missing
    if not built[device]:
        return "the extension was built without CUDA"
    return _no_code_for_gpu() if device == "cuda" else ""


@functools.cache
def _no_code_for_gpu() -> str:
    """Why the CUDA part does not run on the GPUs that are here: each needs a target of its generation, or the last, as PTX."""
    targets = [int(t.rstrip("af")) for t in built["cuda"].split()]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        sm = 10 * major + minor
        if not any(t // 10 == major and t <= sm for t in targets) and sm < targets[-1]:
            return f"the extension's CUDA part was built for sm {built['cuda']}, and GPU {i} is sm_{sm}"
    return ""


@functools.cache
def warn_once(device: str) -> None:
    """Say that reference code stands in for the kernels; called on first use, not on import."""
    warn(f"{reason(device)}; slower reference code serves {device} tensors", RuntimeWarning)
