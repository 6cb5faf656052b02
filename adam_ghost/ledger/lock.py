"""One writer per folder and rank. The lock goes with its process, however that ends."""

import os
import stat
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: only writers of the same process are kept apart
    fcntl = None  # type: ignore[assignment]

# a process's own record locks do not exclude each other
_held: set[Path] = set()


class Locked(RuntimeError):
    """Another run writes to this folder."""


class Lock:
    """Held from construction until ``release``. A forked child does not inherit it, so a data loader's workers cannot keep it.

    Raises:
        Locked: somebody else holds it.
        ValueError: ``path`` is a link or no plain file, which somebody else may have put there to have it written over.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path.parent.resolve() / path.name
        if self.path in _held:
            raise Locked(f"{path.parent} is being written by another run of this process")
        self._fd: int | None = None
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        except OSError as error:
            if path.is_symlink():
                raise ValueError(f"{path} is a symbolic link, a lock must be a file of its own: remove it") from error
            raise
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(fd)
            raise ValueError(f"{path} is linked to another file or no plain one, a lock must be a file of its own: remove it")
        try:
            if fcntl is not None:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise Locked(f"{path.parent} is being written by another run (process {owner})") from error
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd
        _held.add(self.path)

    def release(self) -> None:
        if self._fd is not None:
            _held.discard(self.path)
            os.close(self._fd)
            self._fd = None
