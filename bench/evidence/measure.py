"""Measures the studies' cells, two at a time and the timed ones alone, and keeps each result: what was cut off goes on."""

import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.evidence.studies import STUDIES, Cell, Study

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ("adam_ghost", "kernels", "csrc", "bench")


def code() -> str:
    """A short hash of all sources that results come from, so that those of other code are measured again."""
    files = sorted(f for part in PACKAGE for f in (ROOT / part).rglob("*") if f.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"))
    found = hashlib.sha256()
    for f in files:
        if f.name not in ("page.py", "pictures.py"):  # which only tell them
            found.update(f.read_bytes())
    return found.hexdigest()[:12]


def run(cell: Cell, threads: int) -> dict[str, Any]:
    """Its result, and how many seconds it would have a quiet machine's cores for: of one processor's, or, alone, of the clock's."""
    torch.set_num_threads(threads)
    clock = time.perf_counter if cell.alone else time.process_time
    begun = clock()
    result = cell.measure(**cell.options)
    return {"result": result, "seconds": clock() - begun}


def evidence(folder: Path, quick: bool, only: list[str], tell: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Every study's summary, and what it was measured on. ``tell(done, all, what)`` is called after each cell."""
    studies = [s for s in STUDIES if not only or s.name in only]
    cells = {s.name: s.cells(quick) for s in studies}
    folder.mkdir(parents=True, exist_ok=True)
    of_code, workers = code(), multiprocessing.cpu_count()
    everything = [c for of in cells.values() for c in of]
    left = [c for c in everything if _kept(folder, c, of_code) is None]
    done = len(everything) - len(left)
    tell(done, len(everything), "")

    def keep(cell: Cell, found: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        text = json.dumps({"code": of_code, "cell": cell.name, **found})
        _path(folder, cell).write_text(text)
        tell(done, len(everything), cell.name)

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        running: dict[Future[dict[str, Any]], Cell] = {pool.submit(run, c, 1): c for c in left if not c.alone}
        try:
            for future in as_completed(running):
                keep(running[future], future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for cell in left:
        if cell.alone:  # in a process of its own: the peak of memory is the process'
            with ProcessPoolExecutor(1, context) as own:
                keep(cell, own.submit(run, cell, workers).result())
    return {
        "machine": machine.header(),
        "code": of_code,
        "quick": quick,
        "minutes": _minutes([(c, _kept(folder, c, of_code)) for c in everything], workers),
        "studies": {s.name: _summary(s, folder, cells, of_code) for s in studies},
    }


def _summary(study: Study, folder: Path, cells: dict[str, list[Cell]], of_code: str) -> dict[str, Any]:
    results = [(c, kept["result"]) for c in cells[study.name] if (kept := _kept(folder, c, of_code)) is not None]
    return rounded(study.summary(results)) if results else {}


def _minutes(found: list[tuple[Cell, dict[str, Any] | None]], workers: int) -> float:
    return sum(kept["seconds"] / (1 if cell.alone else workers) for cell, kept in found if kept) / 60


def rounded(x: Any) -> Any:
    """Four digits are more than any of this knows."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def _path(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.json"


def _kept(folder: Path, cell: Cell, of_code: str) -> dict[str, Any] | None:
    path = _path(folder, cell)
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    return kept if kept["code"] == of_code else None
