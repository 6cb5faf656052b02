"""A ledger that several processes write, a process that is killed, and going on with another number of them."""

import shutil

import numpy as np
import pytest
import torch
from loops import train
from ranks import Ranks

import adam_ghost as ag

SIZES = {1: ((8,), (8,)), 2: ((4, 4), (4, 4)), 4: ((2, 2, 2, 2), (2, 2, 2, 2))}
CASE = {"schedule": "midpoint", "steps": 9}


@pytest.fixture(scope="module")
def expected():
    return train("one", sizes=SIZES[1], **CASE)["scores"]


@pytest.fixture(scope="module")
def killed(pair, tmp_path_factory):
    """The folder of a run of two processes, of which one is killed after its last step; and of its checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(AssertionError, match="did not answer"):
        pair.run(train, "ddp", sizes=SIZES[2], ledger=f"{folder}/ledger", checkpoint=f"{folder}/state", end="kill", **CASE)
    return folder


def totals(folder):
    with ag.open_ledger(folder / "ledger") as ledger:
        table = ledger.totals()
    return dict(zip(table["sample"].to_pylist(), table["value"].to_pylist(), strict=True))


def same(found, expected):
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[i] for i in expected], list(expected.values()), rtol=1e-11)


def test_a_killed_process_leaves_a_ledger_that_reads(killed, expected):
    found = totals(killed)
    assert len(found) >= 6 * 8  # up to the checkpoint at least
    np.testing.assert_allclose([found[i] for i in found], [expected[i] for i in found], rtol=1e-11)


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_going_on_with_another_number(size, killed, expected, pair, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "copy")
    case = CASE | {"sizes": SIZES[size], "ledger": f"{folder}/ledger", "checkpoint": f"{folder}/state"}
    if size == 1:
        train("one", **case)
    elif size == 2:
        pair.run(train, "ddp", **case)
    else:
        four = Ranks(4, tmp_path)
        four.run(train, "ddp", **case)
        four.close()
    same(totals(folder), expected)
    with ag.open_ledger(folder / "ledger") as ledger:
        gaps = [g for g in ledger.gaps()["gap"].to_pylist() if g is not None]
    assert len(gaps) == CASE["steps"] and max(gaps) < 1e-9


def test_another_run_is_not_mixed_in(killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "copy")
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
