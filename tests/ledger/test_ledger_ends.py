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

import adam_ghost as ag
from adam_ghost.ledger import layout, leaving

ENDS = 8
STATUS = {"normal": 0, "exception": 1, "exit": 3, "sigterm": -signal.SIGTERM, "handled": 4, "fork": 0}


@pytest.mark.parametrize("kind", STATUS)
def test_ends_without_close(tmp_path, kind):
    program = [sys.executable, Path(__file__).with_name("ends.py"), tmp_path, kind, str(ENDS if kind != "fork" else 10)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(ag.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, timeout=120, check=True, env=environment)
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert {status for status, _ in lines} == {STATUS[kind]}
    for i, (_, handed) in enumerate(lines):
        booked = layout.pq.read_table(tmp_path / str(i) / "steps", partitioning=None)["step"].to_pylist()
        scored = layout.pq.read_table(tmp_path / str(i) / "scores", partitioning=None)["step"].to_pylist()
        assert booked == list(range(1, len(booked) + 1)) and len(booked) >= handed > 0
        assert scored == [step for step in booked for _ in range(made.BATCH)]
        assert not list((tmp_path / str(i)).glob("*/.*"))


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
