"""A ledger that several processes write, a process that is killed, and going on with another number of them."""

import shutil

import numpy as np
import pytest
import torch
from compared import distance, joined
from loops import train

import adam_ghost as ag

SIZES = {1: ((8,), (8,)), 2: ((4, 4), (4, 4)), 4: ((2, 2, 2, 2), (2, 2, 2, 2))}
CASE = {"schedule": "midpoint", "steps": 9}
SPREADS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def expected():
    return train("one", sizes=SIZES[1], **CASE)["scores"]


@pytest.fixture(scope="module", params=SPREADS)
def killed(request, pair, tmp_path_factory):
    """How two processes were spread, of which one was killed in its last step; the folder of their ledger and checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(AssertionError, match=r"processes \[1\] did not answer"):
        pair.run(train, request.param, sizes=SIZES[2], ledger=f"{folder}/ledger", checkpoint=f"{folder}/state", end="kill", **CASE)
    return request.param, folder


def totals(folder):
    with ag.open_ledger(folder / "ledger") as ledger:
        table = ledger.totals()
    return dict(zip(table["sample"].to_pylist(), table["value"].to_pylist(), strict=True))


def same(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-11)


def test_a_killed_process_leaves_a_ledger_that_reads(killed, expected):
    found = totals(killed[1])
    assert len(found) >= 6 * 8  # up to the checkpoint at least, of both
    np.testing.assert_allclose([found[i] for i in found], [expected[i] for i in found], rtol=1e-11)


@pytest.mark.parametrize("size", SIZES)
def test_going_on_with_another_number(size, killed, expected, pair, four, tmp_path):
    spread, folder = killed
    folder = shutil.copytree(folder, tmp_path / "copy")
    case = CASE | {"sizes": SIZES[size], "ledger": f"{folder}/ledger", "checkpoint": f"{folder}/state"}
    if size == 1:
        train("one", **case)
    else:
        {2: pair, 4: four}[size].run(train, spread, **case)
    same(totals(folder), expected)
    with ag.open_ledger(folder / "ledger") as ledger:
        gaps = [g for g in ledger.gaps()["gap"].to_pylist() if g is not None]
    assert len(gaps) == CASE["steps"] and max(gaps) < 1e-9


@pytest.mark.filterwarnings("ignore:adam_ghost. the run")  # resumes, and ends, in the middle of a window
@pytest.mark.parametrize("case", [{"schedule": "lookahead", "warm": True}, {"schedule": "window"}], ids=["lookahead", "window"])
def test_shards_of_other_schedules_go_on(case, pair, four, tmp_path):
    """In four processes from two, as one from one."""

    def halves(spread, first, then, place):
        for steps, ranks, sizes in ((6, first, SIZES[2 if first else 1]), (10, then, SIZES[4 if then else 1])):
            more = case | {"steps": steps, "sizes": sizes, "checkpoint": str(tmp_path / place)}
            found = ranks.run(train, spread, **more) if ranks else [train(spread, **more)]
        return joined(found)

    expected = halves("one", None, None, "one")
    assert len(expected) >= 8 * 7
    assert distance(halves("fsdp", pair, four, "shards"), expected) < 1e-11


def test_another_run_is_not_mixed_in(killed, tmp_path):
    folder = shutil.copytree(killed[1], tmp_path / "copy")
    for part in (folder / "ledger").glob("*/r0-*"):
        part.unlink()  # only process 1's are left
    with pytest.raises(ValueError, match="holds the ledger of an earlier run"):
        train("one", sizes=SIZES[1], ledger=f"{folder}/ledger", **CASE)


def checkpointed(folder):
    """Saved and loaded by torch.distributed.checkpoint, into a run that has seen nothing."""
    from faults import step, wrapped
    from loops import validation
    from torch.distributed import checkpoint

    model, optimizer = wrapped()
    with ag.InRun(model, optimizer, validation(model, False)) as run:
        for t in range(2):
            step(model, optimizer, run, t)
        checkpoint.save({"run": run}, checkpoint_id=folder)
        saved = run.state_dict()
    with ag.InRun(model, optimizer, validation(model, False)) as run:
        checkpoint.load({"run": run}, checkpoint_id=folder)
        return run.step, torch.distributed.get_rank(), len(run.scores().ids), run.state_dict() == saved


def test_distributed_checkpoint(pair, tmp_path):
    (step, _, ids, same_state), (_, _, others, _) = pair.run(checkpointed, str(tmp_path / "state"))
    assert step == 2 and (ids, others) == (6, 0) and same_state
