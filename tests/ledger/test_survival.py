"""The ledger under SIGKILL, a full disk and a second writer."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import ledger_victim

import adam_ghost as ag

STEPS, KILLS = 200, 200


@pytest.fixture(scope="module")
def forks():
    """Processes forked from one that has torch loaded already: each starts in milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("ADAM_GHOST_TESTS_WARM_UP", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "ledger_victim", "adam_ghost.ledger.reader"])
        yield context


def rows(folder):
    """{(step, place in the step): (sample, score)} of a ledger, and the steps that have books."""
    with ag.open_ledger(folder) as ledger:
        scores = ledger.sql("SELECT step, sample, score FROM scores ORDER BY step").to_pylist()
        booked = ledger.sql("SELECT step FROM steps ORDER BY step")["step"].to_pylist()
        tokens = ledger.tokens().to_pylist()
    by_step, by_token = {}, {}
    for row in scores:
        by_step.setdefault(row["step"], []).append((row["sample"], row["score"]))
    for row in tokens:
        by_token.setdefault(row["step"], []).append((row["sample"], sum(row["scores"])))
    assert by_token.keys() >= {step for step in booked if step % 2}  # the first, the third, ...
    for step in by_token.keys() & {*booked}:
        assert [x for _, x in sorted(by_token[step])] == pytest.approx([x for _, x in sorted(by_step[step])], rel=1e-5, abs=1e-9)
    return {step: sorted(found) for step, found in by_step.items()}, booked


def run_to_the_end(forks, folder):
    folder.mkdir(exist_ok=True)
    process = forks.Process(target=ledger_victim.train, args=(folder, STEPS))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def wait_for_steps(process, made, steps):
    """Until training has made so many: moments that machines of any speed reach."""
    while process.is_alive() and made.value < steps:
        time.sleep(0.002)


def test_two_hundred_kills(forks, tmp_path):
    """A kill takes about a third of a second of a core. Nothing is there twice or wrong, no step without those before it."""
    run_to_the_end(forks, tmp_path / "whole")
    whole, booked = rows(tmp_path / "whole/ledger")
    assert booked == list(range(1, STEPS + 1)) == list(whole)
    moments, life, seen = random.Random(7), 0, set()
    folder = tmp_path / "life0"
    for _ in range(KILLS):
        if (folder / "done").exists():
            life += 1
            folder = tmp_path / f"life{life}"
        folder.mkdir(exist_ok=True)
        made = forks.RawValue("i", 0)
        process = forks.Process(target=ledger_victim.train, args=(folder, STEPS, made))
        process.start()
        wait_for_steps(process, made, moments.randrange(2 * ledger_victim.CHECKPOINT))
        time.sleep(moments.uniform(0, 0.04))
        process.kill()
        process.join()
        if not (folder / "ledger/run.json").exists():
            continue  # killed before it began
        found, booked = rows(folder / "ledger")  # which takes no part whose bytes are not those written
        assert list(found) == list(range(1, len(found) + 1))  # every complete part, without a gap
        assert all(found[step] == whole[step] for step in found)  # nothing twice, nothing else
        assert booked == list(range(1, len(booked) + 1)) and len(booked) <= len(found)
        seen.add((len(found), made.value))
    assert len(seen) > KILLS // 3  # the moments differed
    run_to_the_end(forks, folder)
    found, booked = rows(folder / "ledger")
    assert found == whole and booked == list(range(1, STEPS + 1))
    with ag.open_ledger(folder / "ledger") as a, ag.open_ledger(tmp_path / "whole/ledger") as b:
        question = "SELECT sample, sum(score ORDER BY step) AS x FROM scores GROUP BY sample ORDER BY sample"
        assert a.sql(question) == b.sql(question)


def test_second_writer_is_refused_and_the_lock_goes_with_its_process(forks, tmp_path):
    ready = forks.Event()
    process = forks.Process(target=ledger_victim.hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match=f"another run .process {process.pid}"):
        ag.LedgerWriter(tmp_path)
    other_rank = ag.LedgerWriter(tmp_path, rank=1)
    with pytest.raises(RuntimeError, match="another run of this process"):
        ag.LedgerWriter(tmp_path, rank=1)
    other_rank.close()
    process.kill()
    process.join()
    ag.LedgerWriter(tmp_path).close()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_full_disk(forks, tmp_path, on_error):
    answer = forks.Queue()
    process = forks.Process(target=ledger_victim.fill_the_disk, args=(tmp_path, on_error, answer))
    process.start()
    trained, said, raised = answer.get(timeout=60)
    process.join()
    if on_error == "warn":
        assert trained == 60 and len(said) == 1 and raised is None
    else:
        assert trained <= 21 and not said
    assert "has stopped" in (said[0] if said else raised)
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.sql("SELECT count(DISTINCT step) AS n FROM steps")["n"].to_pylist() == [20]
    assert not list(tmp_path.glob("*/.*"))
