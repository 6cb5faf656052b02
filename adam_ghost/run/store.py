"""Where the steps of a window wait to be swept: on the device, and beyond a budget in pinned memory or in files."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(text: str | int | None) -> int | None:
    """``"8GB"`` as a number of bytes; None: no bound.

    Raises ValueError where it is no amount.
    """
    if text is None or (isinstance(text, int) and not isinstance(text, bool) and text >= 0):
        return text
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text) if isinstance(text, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"memory must be an amount such as '8GB', or None, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


class Held:
    """Tensors that were put away; ``get`` brings them back, on the device that they came from."""

    def __init__(self, tensors: Sequence[Tensor | None], store: "Store"):
        self._device = next((x.device for x in tensors if x is not None), torch.device("cpu"))
        self._store, self._path = store, None
        self.bytes = sum(x.numel() * x.element_size() for x in tensors if x is not None)
        self._on_device = store.limit is None or store.used + self.bytes <= store.limit
        if self._on_device:
            store.used += self.bytes
            self._tensors = list(tensors)
        elif self._device.type == "cpu":
            self._path = store.next_file()
            torch.save(list(tensors), self._path)
            self._tensors = []
        else:
            self._tensors = [None if x is None else _pinned(x) for x in tensors]

    def get(self) -> list[Tensor | None]:
        if self._path is not None:
            return torch.load(self._path, weights_only=True)
        if self._on_device:
            return self._tensors
        return [None if x is None else x.to(self._device, non_blocking=True) for x in self._tensors]

    def drop(self) -> None:
        """Lets go of them."""
        if self._on_device:
            self._store.used -= self.bytes
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._on_device, self._tensors = False, []


class Store:
    """Keeps tensors within ``limit`` bytes of the device; the rest in pinned memory or, on a CPU, in a folder's files."""

    def __init__(self, limit: int | None, folder: str | None = None):
        self.limit, self.used = limit, 0
        self._parent, self._files = folder, 0
        self._folder: Path | None = None

    def put(self, tensors: Sequence[Tensor | None]) -> Held:
        return Held(tensors, self)

    def next_file(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="adam_ghost-", dir=self._parent))
        self._files += 1
        return self._folder / f"{self._files}.pt"

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _pinned(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)  # in the stream's order: read back after it was written
    return host
