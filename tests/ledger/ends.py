"""Programs that write a ledger and leave without closing it: each a fork of this one, which has imported what they need.

``python ends.py FOLDER FILL COUNT KIND...`` prints, for each end, its kind, its exit status and how many steps it had made.
FILL is ``writer``, which hands steps of a seed to a LedgerWriter, or ``run``, which trains: an InRun holds steps of its own.
"""

import gc
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import made
import pyarrow as pa

from adam_ghost.ledger.writer import LedgerWriter

STEPS = 5


def hand_over(writer, counter, steps):
    for number in range(1, steps + 1):
        step = made.step(number)
        writer.begin(step.ids, dict)
        writer.add(step)
        counter[:8] = struct.pack("q", number)


def train(writer, counter, steps):
    import torch

    import adam_ghost as ag

    torch.set_num_threads(1)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    run = ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).square().mean(), ledger=writer)
    x = torch.randn(made.BATCH, 3)
    for number in range(1, steps + 1):
        run.batch(list(range(made.BATCH)))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        counter[:8] = struct.pack("q", number)
    train.run = run  # a run that is forgotten before the end is another test's


def leave(fill, kind, folder, counter):
    writer = LedgerWriter(folder, flush_seconds=3600)
    if kind == "sigterm":
        fill(writer, counter, 10**6)  # until it is killed
    fill(writer, counter, STEPS)
    if kind == "exception":
        raise RuntimeError("out of memory")
    if kind == "exit":
        sys.exit(3)
    if kind == "fork":  # as a data loader's worker: what is in hand is not its own to write
        child = os.fork()
        if child == 0:
            writer.flush()
            sys.exit(0)
        os.waitpid(child, 0)
        writer.add(made.step(STEPS + 1))
        counter[:8] = struct.pack("q", STEPS + 1)
    if kind == "handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
        os.kill(os.getpid(), signal.SIGTERM)


def end(fill, kind, folder, moment):
    """Forks a program and waits for its end: its exit status, and how many steps it had made."""
    counter = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of a traceback that is meant
        leave(fill, kind, folder, counter)
        sys.exit(0)
    if kind == "sigterm":
        while not struct.unpack("q", counter[:8])[0]:
            time.sleep(0.001)
        time.sleep(moment)
        os.kill(child, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, struct.unpack("q", counter[:8])[0]


def warm_up():
    """Makes the ends that follow cheap."""
    pa.array([1, None])  # loads what the first part does, pandas among it
    gc.collect()
    gc.freeze()  # a child neither copies nor looks through what is there already


def main():
    folder, fill, count = Path(sys.argv[1]), {"writer": hand_over, "run": train}[sys.argv[2]], int(sys.argv[3])
    if fill is train:
        import ledger_victim

        ledger_victim.warm_up()
    moments = random.Random(3)
    for i in range(count):
        for kind in sys.argv[4:]:
            print(kind, *end(fill, kind, folder / kind / str(i), moments.uniform(0, 0.02)), flush=True)
        warm_up()  # after the first of each kind, which has to load everything while it ends


if __name__ == "__main__":
    main()
