"""What is still in hand when its process ends goes to the disk: at the end of the program, after an exception, at SIGTERM.

SIGTERM is taken over only where nobody else handles it; the process then dies of it as it would have, a moment later.
"""

import atexit
import concurrent.futures.thread  # noqa: F401  pyarrow loads it when it first writes, which fails when the interpreter is ending
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any, Protocol


class Holder(Protocol):
    """Holds what is not written yet."""

    def flush(self) -> None:
        """Writes it; may be called in the midst of anything else, by a signal."""

    def close(self) -> None:
        """Writes it, for good."""


class Leaver(Protocol):
    @property
    def holder(self) -> Holder:
        """Who is to be asked."""


_open: "weakref.WeakSet[Leaver]" = weakref.WeakSet()
_at_exit = False


def watch(leaver: Leaver) -> None:
    """``leaver`` is closed when the process ends, unless ``leave_alone`` comes before."""
    global _at_exit
    if not _at_exit:
        _at_exit = True
        if multiprocessing.parent_process() is None:
            atexit.register(_close_all)
        else:  # its children leave without atexit
            Finalize(None, _close_all, exitpriority=100)
    _open.add(leaver)
    # another handler knows best what SIGTERM means, and ends the program in some other way
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def leave_alone(leaver: Leaver) -> None:
    _open.discard(leaver)
    if not _open:
        _give_back()


def _close_all() -> None:
    for leaver in list(_open):
        try:
            leaver.holder.close()
        except Exception:
            traceback.print_exc()  # and go on: the others are still to be written


def _terminate(number: int, frame: FrameType | None) -> Any:
    for leaver in list(_open):
        try:
            leaver.holder.flush()
        except Exception:
            traceback.print_exc()
    # called by somebody else's handler, which took ours along, what follows is for that one to say
    if signal.getsignal(number) is _terminate:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _give_back() -> None:
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is _terminate:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _forked() -> None:
    """A child has nothing to write: what is in hand is its parent's."""
    global _at_exit
    _open.clear()
    _give_back()
    _at_exit = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
