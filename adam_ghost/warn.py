"""Warnings that begin with the package's name and point to the line of the user's program that led to them."""

import sys
import warnings
from pathlib import Path
from types import FrameType

_OURS = (str(Path(__file__).resolve().parent), "torch")  # a folder, and a package's name


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns ``adam_ghost: message`` at the first frame that is neither this package's nor PyTorch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _inside(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"adam_ghost: {message}", category, stacklevel=level)


def _inside(frame: FrameType) -> bool:
    folder, package = _OURS
    name = frame.f_globals.get("__name__", "")
    return name.split(".")[0] == package or frame.f_code.co_filename.startswith(folder)
