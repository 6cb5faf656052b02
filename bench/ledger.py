"""What a ledger costs to write, and how soon it answers: many rows, in steps of a batch, as ``InRun`` hands them over."""

import resource
import time
from pathlib import Path

import numpy as np

from adam_ghost.ledger.books import Arrived, StepRecord
from adam_ghost.ledger.reader import open_ledger
from adam_ghost.ledger.writer import LedgerWriter
from adam_ghost.report import write_report

BATCH, GROUPS = 32, 8


def write(folder: Path, rows: int, samples: int) -> dict[str, float]:
    """Seconds of the training thread and of both threads' processors, for ``rows`` scores of ``samples`` samples."""
    random = np.random.default_rng(0)
    writer = LedgerWriter(folder, restart=True)
    writer.begin([0], dict)
    steps = rows // BATCH
    ids = random.integers(0, samples, (steps, BATCH))
    scores = random.normal(0, 1e-3, (steps, BATCH, 1))  # all different: equal ones would cost neither time nor room
    totals = scores.sum(1).tolist()
    handed, cpu = 0.0, time.process_time()
    for step in range(steps):
        names = ids[step].tolist()
        total = totals[step]
        record = StepRecord(step + 1, BATCH, [1e-3], [1.0], True, total, total, [0.0], 1.0, False, 1e-3, epoch=0, val_loss_at=0.5)
        started = time.perf_counter()
        writer.add(Arrived(record, names, scores[step]))
        handed += time.perf_counter() - started
    writer.close()
    size = sum(p.stat().st_size for p in folder.rglob("*.parquet"))
    return {"rows": steps * BATCH, "handing_over_s": handed, "processor_s": time.process_time() - cpu, "bytes": size}


def ask(folder: Path, samples: int) -> dict[str, float]:
    """Seconds of each question, and the process's largest memory."""
    groups = {i: f"group {i % GROUPS}" for i in range(samples)}
    found = {}
    with open_ledger(folder) as ledger:
        for name, question in {
            "top": lambda: ledger.top(10),
            "top, by total": lambda: ledger.top(10, value="total"),
            "groups": lambda: ledger.groups(groups, bootstrap=0),
            "groups, with intervals": lambda: ledger.groups(groups),
            "report": lambda: write_report(ledger, folder / "report.html"),
        }.items():
            started = time.perf_counter()
            question()
            found[name] = time.perf_counter() - started
    found["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return found
