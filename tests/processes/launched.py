"""Trainings of tests/processes/loops.py as ``torchrun`` starts their processes; the first writes what became of all, as JSON."""

import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from loops import train
from torch import distributed

from adam_ghost.scores import together

SIZES = {2: ((3, 2), (1, 4)), 4: ((3, 1, 2, 2), (2, 0, 4, 1))}  # of each process' micro-batches
SCHEDULES: dict[str, dict[str, Any]] = {
    "midpoint": {"steps": 3},
    "gauss": {"steps": 3},
    "lookahead": {"steps": 3, "warm": True},
    "window": {"steps": 6},
}
SPREADS = ("ddp", "fsdp")


def cases(size: int) -> dict[str, dict[str, Any]]:
    """Accumulated, clipped, with batches of every size: in float64; single steps, of the schedules that score these: in float32."""
    common = {"sizes": SIZES[size]}
    found = {f"{name} float64": {"schedule": name, "micro": 2, "clip": 0.05, **options} for name, options in SCHEDULES.items()}
    for name in ("midpoint", "lookahead"):
        found[f"{name} float32"] = {"schedule": name, "steps": 1, "warm": True, "dtype": torch.float32}
    return {name: common | options for name, options in found.items()}


def main(path: str) -> None:
    torch.set_num_threads(1)
    together.SMALL = 0  # as tests/conftest.py says of the process that tests
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = distributed.get_rank(), distributed.get_world_size()
    found = {}
    for spread in SPREADS:
        for name, case in cases(size).items():
            mine, plain = train(spread, **case), train(spread, **case | {"schedule": None})
            apart = [float(abs(w - x).max()) for w, x in zip(mine["weights"], plain["weights"], strict=True)]
            every: list[Any] = [None] * size
            distributed.all_gather_object(every, mine["scores"])
            scores = {i: s for part in every for i, s in part.items()}
            found[f"{spread} {name}"] = {"scores": scores, "weights apart": max(apart)}
    if rank == 0:
        with open(path, "w") as file:
            json.dump(found, file)
    distributed.barrier()
    # a thread of gloo's that wants the interpreter while that ends aborts the process, now and then
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
