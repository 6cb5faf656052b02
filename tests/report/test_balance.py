"""The report says of the validation loss's drop what each step booked, up to where each measured it."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("duckdb")
import adam_ghost as ag
from adam_ghost.ledger.books import Arrived, StepRecord
from adam_ghost.report import write_report
from adam_ghost.report.balance import balance, in_words


def walk(places, rate=0.7, pull=0.1):
    """Steps on a line of losses: history takes off ``pull``, the batch ``rate`` of it more; the loss is measured at ``places``."""
    loss, steps = 5.0, []
    for number, at in enumerate(places, 1):
        loss -= pull * number
        own = rate * pull * number
        seen = None if at is None else at
        measured = loss - own * (seen or 0.0)
        steps.append({"step": number, "score_sum": own, "history": pull * number, "val_loss": measured, "val_loss_at": seen})
        steps[-1]["horizon"] = None
        loss -= own
    return steps


@pytest.mark.parametrize("places", [[0.5] * 6, [0.0] * 6, [0.5, 0.5, 0.0, 0.0, 1.0, 0.5], [0.5, None, None, 0.5, None, 0.0]])
def test_curves_meet_the_measured_drop(places):
    found = balance(walk(places))
    assert found.step.tolist() == [i + 1 for i, at in enumerate(places) if at is not None]
    np.testing.assert_allclose(found.own + found.history, found.drop, rtol=1e-12, atol=1e-12)
    assert found.drop[0] == 0 and (np.diff(found.drop) > 0).all()


def test_words_give_the_shares():
    text = in_words(walk([0.0] * 11))
    # from after history 1 to after history 11: 5.5 - .7 * 1.1 of the batches, 6.6 - .1 of history
    assert "From step 1 to step 11 the validation loss fell by 10.35." in text
    assert "took off 3.85 (37%); 6.5 (63%) came through momentum" in text and "nothing is left over" in text


def test_words_say_what_is_missing():
    steps = walk([0.5] * 9)[::2]
    text = in_words(steps, every=2)
    assert re.search(r"[1-9][.\d]* is left over", text) and "steps between the attributed ones are in neither" in text
    risen = [{**s, "val_loss": -s["val_loss"]} for s in walk([0.5] * 4)]
    assert "the validation loss rose by" in in_words(risen) and "%" not in in_words(risen)
    assert "no drop" in in_words(walk([0.5, None]))


def write(folder, records):
    writer = ag.LedgerWriter(folder)
    for record in records:
        writer.begin([0, 1], dict)
        writer.add(Arrived(record, [0, 1], np.array([[0.25], [0.5]])))
    writer.close()
    return write_report(folder, folder / "report.html").read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_windows_have_a_sentence_and_no_chart(tmp_path):
    nan = [float("nan")]
    records = [
        StepRecord(i, 2, [1e-3], [2.0], True, [0.75], [0.75], nan, 1.0, False, 0.01, window=i - i % 4, horizon=4 - i % 4)
        for i in range(12)
    ]
    (target,) = data_of(write(tmp_path, records))["targets"]
    assert "balance" not in target["charts"] and target["explained"] is None
    assert "the validation loss as far as its step's window looks, 1 to 4 steps on" in target["balance"]


def test_the_page_draws_what_the_words_say(tmp_path):
    records = [
        StepRecord(i, 2, [1e-3], [9.0 - i], True, [0.75], [0.75], [0.25], 1.0, False, 0.01, val_loss_at=0.5) for i in range(1, 9)
    ]
    (target,) = data_of(write(tmp_path, records))["targets"]
    own, both, drop = (line["y"] for line in target["charts"]["balance"]["series"])
    np.testing.assert_allclose(both, drop)
    assert own[-1] == pytest.approx(0.75 * 7) and "took off 5.25 (75%); 1.75 (25%) came through momentum" in target["balance"]
    assert target["explained"] == {"drop": 7, "own": 5.25, "history": 1.75, "rest": 0}
    assert "the samples' own steps explain 75% of its drop of 7." in target["headline"]["sentence"]
