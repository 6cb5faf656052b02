"""What a long run keeps of its steps is bounded, and a checkpoint needs no pickled code."""

import io

import pytest
import torch

from adam_ghost.ledger.books import Audit, StepRecord
from adam_ghost.run.steps import KEPT, Steps
from adam_ghost.run.totals import Totals


def record(step):
    audit = Audit(0.99, 0.1, [0.5]) if step % 3 == 0 else None
    return StepRecord(step, 8, [1e-3], [1.0 / step], True, [0.1 * step], [0.2], [0.3], 1.0, False, 0.01, audit)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


def test_a_million_steps():
    steps = Steps()
    for i in range(1, 10**6 + 1):
        steps.append(record(i))
    assert len(steps) == KEPT and steps.booked == 10**6
    assert KEPT * 2000 < 100e6  # a record is less than 2,000 bytes
    assert [s.step for s in steps[-3:]] == [10**6 - 2, 10**6 - 1, 10**6] and steps[0].step == 10**6 - KEPT + 1
    state, size = saved(steps.state_dict())
    assert size < 5e6
    again = Steps()
    again.load_state_dict(state)
    assert list(again) == list(steps) and again.booked == 10**6


@pytest.mark.parametrize("ids", [[3, 1, 2], ["a", "b", "c"]])
def test_totals_are_tensors(ids):
    totals = Totals()
    totals.add(ids, torch.randn(3, 2).double().numpy())
    again = Totals()
    again.load_state_dict(saved(totals.state_dict())[0])
    for name, a, b in zip(("ids", "total", "standardized", "steps"), totals.read(False), again.read(False), strict=True):
        assert a == b if name == "ids" else (a == b).all(), name
