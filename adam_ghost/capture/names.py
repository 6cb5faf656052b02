"""The functions that torch hands to a function mode, found by their public names."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

_HOMES = {
    "torch": torch,
    "Tensor": torch.Tensor,
    "F": F,
    "linalg": torch.linalg,
    "special": torch.special,
    "fft": torch.fft,
}


def functions(name: str) -> list[Callable]:
    """Every function called ``name``, of torch, tensors and ``F``; ``linalg.norm`` is that of one place. Absent names are no error.

    The same name elsewhere may be another function: ``torch.polar`` is elementwise, ``torch.linalg.polar`` is not.
    """
    home, _, bare = name.rpartition(".")
    homes = [_HOMES[home]] if home else [torch.Tensor] if name.startswith("__") else [torch, torch.Tensor, F]
    found = (getattr(place, bare, None) for place in homes)
    return [f for f in found if callable(f) and not isinstance(f, type)]


_COUNTERPARTS = {"transformers.grouped_mm_fallback": torch._grouped_mm}


def counterpart(func: Callable) -> Callable:
    """The function of torch that computes what ``func``, an operator of another library, does; or ``func`` itself."""
    return _COUNTERPARTS.get(str(func), func) if isinstance(func, torch._ops.OpOverloadPacket) else func
