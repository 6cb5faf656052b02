"""Which implementations serve on this machine, and why the others do not."""

import importlib.metadata
import os
from typing import NamedTuple

import torch

from adam_ghost import extension
from adam_ghost.extras import how_to_install

TORCH = ((2, 11), (2, 15))  # needed, and the newest that the tests were run with


class Finding(NamedTuple):
    name: str
    active: bool
    why: str


def examine() -> list[Finding]:
    """One finding for each part that may serve or not, in the order in which they are preferred."""
    return [_torch(), _gpu(), _triton(), _extension_cuda(), _extension_cpu(), Finding("reference code", True, "always there")]


def _torch() -> Finding:
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    oldest, newest = (".".join(map(str, v)) for v in TORCH)
    if version < TORCH[0]:
        return Finding("torch", False, f"{torch.__version__}; needed: >={oldest}")
    untested = "" if version <= TORCH[1] else f"; newer than {newest}, the newest that the tests were run with"
    return Finding("torch", True, torch.__version__ + untested)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("CUDA device", True, torch.cuda.get_device_name())
    return Finding(
        "CUDA device", False, f"torch is built for CUDA {v}, no device is visible" if (v := torch.version.cuda) else "CPU torch"
    )


def _triton() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Triton kernels", False, f"triton is not installed ({how_to_install('triton')})")
    if torch.cuda.is_available():
        return Finding("Triton kernels", True, version)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("Triton kernels", True, f"{version}, interpreted on the CPU: for tests")
    return Finding("Triton kernels", False, f"{version}, but no CUDA device")


def _extension_cuda() -> Finding:
    why = extension.reason("cuda")
    if why:
        return Finding("extension, CUDA", False, why)
    built = f"built for compute capability {extension.built['cuda']}"
    if not torch.cuda.is_available():
        return Finding("extension, CUDA", False, f"{built}, but no CUDA device")
    return Finding("extension, CUDA", True, built)


def _extension_cpu() -> Finding:
    why = extension.reason("cpu")
    return Finding("extension, CPU", not why, why or f"runs its {extension.built['cpu']} code")
