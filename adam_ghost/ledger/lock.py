"""One writer per folder and rank. The lock goes with its process, however that ends."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: only writers of the same process are kept apart
    fcntl = None

# a process's own record locks do not exclude each other
_held: set[Path] = set()


class Locked(RuntimeError):
    """Another run writes to this folder."""


class Lock:
    """Held from construction until ``release``. A forked child does not inherit it, so a data loader's workers cannot keep it."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.resolve()
        if self.path in _held:
            raise Locked(f"{path.parent} is being written by another run of this process")
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise Locked(f"{path.parent} is being written by another run (process {owner})") from error
        os.ftruncate(self._fd, 0)
        os.write(self._fd, str(os.getpid()).encode())
        _held.add(self.path)

    def release(self) -> None:
        if self._fd is not None:
            _held.discard(self.path)
            os.close(self._fd)
            self._fd = None
