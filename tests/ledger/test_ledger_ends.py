"""A program that ends without ``close()`` loses nothing that its ledger was handed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import made
import pyarrow.parquet as pq

import adam_ghost as ag
from adam_ghost.ledger import leaving

STATUS = {"normal": 0, "exception": 1, "exit": 3, "sigterm": -signal.SIGTERM, "handled": 4, "fork": 0}


@pytest.mark.parametrize(
    ("fill", "kinds", "count"), [("writer", list(STATUS), 50), ("run", list(STATUS)[:5], 5)], ids=["writer", "run"]
)
def test_ends_without_close(tmp_path, fill, kinds, count):
    """Fifty ends of each kind of a program that filled a writer, five of each kind of one that trained."""
    program = [sys.executable, Path(__file__).with_name("ends.py"), tmp_path, fill, str(count), *kinds]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(ag.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=300, check=True, env=environment)
    ends = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, *_ in ends] == count * kinds
    for i, (kind, status, made_steps) in enumerate(ends):
        folder = tmp_path / kind / str(i // len(kinds))
        assert int(status) == STATUS[kind]
        booked, scored = (
            pq.ParquetFile(folder / table / "r0-00000001.parquet").read()["step"].to_pylist() for table in ("steps", "scores")
        )
        assert booked == list(range(1, len(booked) + 1)) and len(booked) >= int(made_steps) > 0
        assert scored == [step for step in booked for _ in range(made.BATCH)]
        assert sorted(p.name for p in folder.glob("*/*")) == 2 * ["r0-00000001.parquet"]


def start(folder):
    writer = ag.LedgerWriter(folder)
    writer.begin([0], dict)
    return writer


def test_sigterm_is_taken_over_only_from_its_default_action(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        one, two = start(tmp_path / "1"), start(tmp_path / "2")
        assert signal.getsignal(signal.SIGTERM) is leaving._terminate
        one.close()
        assert signal.getsignal(signal.SIGTERM) is leaving._terminate
        two.close()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        for other in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGTERM, other)
            writer = start(tmp_path / str(id(other)))
            assert signal.getsignal(signal.SIGTERM) is other
            writer.close()
            assert signal.getsignal(signal.SIGTERM) is other
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_took_ours_along_decides_what_follows(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        writer = start(tmp_path)
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *arguments: ours(*arguments))
        step = made.step(1)
        writer.add(step)
        os.kill(os.getpid(), signal.SIGTERM)
        with ag.open_ledger(tmp_path) as ledger:
            assert ledger.steps().num_rows == 1
        writer.close()
    finally:
        signal.signal(signal.SIGTERM, before)
