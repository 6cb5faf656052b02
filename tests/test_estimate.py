"""Reckoned costs against those that were measured on a CPU, and against counts by hand."""

import json
from pathlib import Path

import pytest

from adam_ghost.estimate import DEVICES, STATE, Device, Job, estimate

ROOT = Path(__file__).resolve().parents[1]
MEASURED = json.loads((ROOT / "bench" / "results" / "throughput-cpu.json").read_text(encoding="utf-8"))
SIZES = {name: MEASURED["setting"][name] for name in ("layers", "width", "vocabulary")}
JOB = Job(**SIZES, tokens=256, samples=16, validation=1, itemsize=4)
CPU = Device(450e9, 20e9, 16e9)  # two cores: 180 GFLOP/s of products


def shares(job=JOB, device=CPU):
    return {row.schedule: row.share for row in estimate(job, device)}


def test_shares_of_single_steps_are_those_measured():
    found = shares()
    assert list(found) == ["plain", "midpoint", "gauss", "lookahead", "window", "window, cheap"] and found["plain"] == 1
    # the machine was shared, and midpoint's products were of half precision there: the quartiles say how far
    for schedule in ("midpoint", "lookahead"):
        low, high = MEASURED["shares"][schedule]["of_plain_quartiles"]
        assert low - 0.05 < found[schedule] < high
    assert found["gauss"] < found["midpoint"] < found["lookahead"] < 1


@pytest.mark.parametrize(
    ("schedule", "ahead", "every", "measured"), [("window", 0, 1, 0.31), ("window", 32, 4, 0.51), ("window, cheap", 32, 4, 0.67)]
)
def test_shares_of_windows_are_those_measured(schedule, ahead, every, measured):
    """docs/schedules.md: one run of each."""
    assert shares(JOB._replace(ahead=ahead, every=every))[schedule] == pytest.approx(measured, abs=0.06)


def test_every_for_nine_tenths_keeps_its_word():
    rows = estimate(Job(), DEVICES["h100"])[1:]
    for row in rows:
        thinned = shares(Job(every=row.every), DEVICES["h100"])[row.schedule]
        assert thinned >= 0.9
        assert row.every == 1 or shares(Job(every=row.every - 1), DEVICES["h100"])[row.schedule] < 0.9
    assert any(row.every > 1 for row in rows)


def test_more_of_everything_costs_more():
    for name, more in (("validation", 4), ("targets", 3)):
        assert all(shares(JOB._replace(**{name: more}))[s] < x for s, x in shares().items() if s != "plain")
    assert shares(JOB._replace(refresh=4))["lookahead"] > shares()["lookahead"]


def test_memory():
    job = Job(layers=2, width=8, vocabulary=10, tokens=4, samples=3, window=4, ahead=0)
    N = 2 * 12 * 64 + 80 + 32
    activations = 2 * 12 * (2 * 16 * 8 + 10)
    by = {row.schedule: row.held for row in estimate(job, DEVICES["h100"])}
    assert job.parameters == N and by["lookahead"] == 8 * N and by["midpoint"] == 8 * N + activations
    assert by["window"] == 8 * N + 4 * N * (4 + 12 + 3)
    tight = Device(1e12, 1e12, STATE * N + activations + 8 * N)
    assert [r.schedule for r in estimate(job, tight) if r.fits] == ["plain", "lookahead"]


@pytest.mark.parametrize(("name", "value"), [("layers", 0), ("every", -1), ("ahead", -1)])
def test_refuses_sizes_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        estimate(Job(**{name: value}), CPU)
