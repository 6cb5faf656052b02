"""The device a launch is meant for: its compute capability and the number of its multiprocessors."""

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # read at import, as triton.jit does


def capability() -> int:
    """80, 90, 100, ... of the current device; the interpreter, which runs every form, counts as 90."""
    return 90 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def multiprocessors(x: Tensor) -> int:
    if x.device.type == "cuda":
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 3 if INTERPRETED else 132  # under the interpreter few, so that small cases are split across programs
