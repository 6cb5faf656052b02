"""Programs that write a ledger and leave without closing it: each a fork of this one, which has imported what they need.

``python ends.py FOLDER KIND COUNT`` prints, for each end, its exit status and how many steps it had handed over.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import made

from adam_ghost.ledger.writer import LedgerWriter


def write(writer, counter, steps):
    for number in range(1, steps + 1):
        step = made.step(number)
        writer.begin(step.ids, dict)
        writer.add(step)
        counter[:8] = struct.pack("q", number)


def leave(kind, folder, counter):
    writer = LedgerWriter(folder, flush_seconds=3600)
    if kind == "sigterm":
        write(writer, counter, 10**6)  # until it is killed
    write(writer, counter, 5)
    if kind == "exception":
        raise RuntimeError("out of memory")
    if kind == "exit":
        sys.exit(3)
    if kind == "fork":
        child = os.fork()
        if child == 0:
            writer.flush()
            sys.exit(0)
        os.waitpid(child, 0)
        write_more = made.step(6)
        writer.add(write_more)
        counter[:8] = struct.pack("q", 6)
    if kind == "handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        os.kill(os.getpid(), signal.SIGTERM)


def main():
    folder, kind, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    moments = random.Random(3)
    for i in range(count):
        counter = mmap.mmap(-1, 8)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of a traceback that is meant
            leave(kind, folder / str(i), counter)
            return
        if kind == "sigterm":
            while not struct.unpack("q", counter[:8])[0]:
                time.sleep(0.001)
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, struct.unpack("q", counter[:8])[0], flush=True)


if __name__ == "__main__":
    main()
