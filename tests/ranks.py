"""A few processes that stand ready to run functions together, so that many checks share their start."""

import os
import queue
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed

# what processes share that are forked off the one that has it: loading it takes longer than most checks
LOADED = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "adam_ghost.inrun", "adam_ghost.ledger.writer"]
# seconds that a check may take, and that an exchange waits for another process
TIMEOUT, PATIENCE = 60, 10


class Ranks:
    """``size`` processes in one gloo group; ``run`` calls a function in all of them."""

    def __init__(self, size: int, folder: os.PathLike):
        self.size, self._folder, self._started = size, folder, 0
        self.processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(LOADED)
        self._started += 1
        store = f"file://{self._folder}/store{self._started}"
        self._tasks, self._results = [context.Queue() for _ in range(self.size)], context.Queue()
        for rank, tasks in enumerate(self._tasks):
            process = context.Process(target=_work, args=(rank, self.size, store, tasks, self._results), daemon=True)
            process.start()
            self.processes.append(process)

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` of each process, by rank. Raises AssertionError with the traceback where one fails."""
        if not self.processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args, kwargs))
        found: dict[int, Any] = {}
        errors = []
        deadline = time.monotonic() + TIMEOUT
        while len(found) < self.size:
            try:
                rank, value, error = self._results.get(timeout=1)
            except queue.Empty:
                missing = set(range(self.size)) - found.keys()
                all_dead = not any(self.processes[rank].is_alive() for rank in missing)
                if not all_dead and time.monotonic() < deadline:
                    continue
                self.close()
                raise AssertionError(f"processes {sorted(missing)} did not answer\n" + "\n".join(errors)) from None
            found[rank] = value
            if error:
                errors.append(f"process {rank}:\n{error}")
        if errors:
            self.close()  # one may have left the others in the midst of an exchange
            raise AssertionError("\n".join(errors))
        return [found[rank] for rank in range(self.size)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


def _work(rank: int, size: int, store: str, tasks: Any, results: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    while True:
        function, args, kwargs = tasks.get()
        try:
            results.put((rank, function(*args, **kwargs), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
