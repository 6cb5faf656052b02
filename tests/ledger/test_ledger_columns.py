"""What a run books is what the table of steps holds, whatever the record's fields are."""

from dataclasses import dataclass, fields

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import made

import adam_ghost as ag
from adam_ghost.ledger import books
from adam_ghost.ledger.books import Audit, PerTarget, StepRecord


def test_every_field_is_a_column_that_holds_its_value(tmp_path):
    step = made.step(1, targets=2)
    for place, (name, value) in enumerate((f.name, getattr(step.record, f.name)) for f in fields(StepRecord)):
        if value is None:
            setattr(step.record, name, Audit(0.9, 0.1, [1.0, 2.0], 0.3) if name == "audit" else 100 + place)
    writer = ag.LedgerWriter(tmp_path)
    writer.begin(step.ids, dict)
    writer.add(step)
    writer.close()
    with ag.open_ledger(tmp_path) as ledger:
        rows = ledger.sql("SELECT * FROM steps ORDER BY target").to_pylist()
    for k, row in enumerate(rows):
        for field in fields(StepRecord):
            value = getattr(step.record, field.name)
            if field.name == "audit":
                assert (row["audit_r"], row["audit_relative_l2"], row["audit_loss_drop"]) == (0.9, 0.1, [1.0, 2.0][k])
                assert row["audit_alone"] == 0.3
            else:
                assert row[field.name] == (value[k] if field.type == "PerTarget" or field.type == PerTarget else value), field.name


def test_a_new_field_is_a_new_column():
    @dataclass
    class Longer(StepRecord):
        temperature: float | None = None
        flatness: PerTarget = ()

    new = books.columns(Longer)[len(books.columns()) :]
    assert new == (("temperature", float, True), ("flatness", PerTarget, False))
    record = Longer(1, 2, [0.1], [1.0, 2.0], True, [1.0, 2.0], [1.0, 2.0], [0.0, 0.0], 1.0, False, 0.1, temperature=3.0)
    assert books.rows(record)[1]["step"] == 1


def test_tokens_are_a_table_of_their_own(tmp_path):
    steps = made.write(tmp_path / "ledger", targets=2, tokens=True)
    made.write(tmp_path / "plain")
    with ag.open_ledger(tmp_path / "ledger") as ledger, ag.open_ledger(tmp_path / "plain") as plain:
        for target in (0, 1):
            expected = sorted((i, s.record.step, x[:, target].tolist()) for s in steps for i, x in s.tokens)
            assert sorted(tuple(row.values()) for row in ledger.tokens(target=target).to_pylist()) == expected
        one = steps[3].ids[0]
        assert set(ledger.tokens([one])["sample"].to_pylist()) == {one} and ledger.tokens([10**6]).num_rows == 0
        assert plain.tokens().num_rows == 0
        with pytest.raises(ValueError, match="target must be one of 0, 1, got 2"):
            ledger.tokens(target=2)


def test_what_tokens_say_is_described(tmp_path):
    made.write(tmp_path / "ledger")
    ag.describe_samples(tmp_path / "ledger", lambda i: {"tokens": ["a", f" {i}"]} if i % 2 else None)
    with ag.open_ledger(tmp_path / "ledger") as ledger:
        told = ledger.described([1, 2, 3])
        assert {i: row["tokens"] for i, row in told.items()} == {1: ["a", " 1"], 2: None, 3: ["a", " 3"]}
    with pytest.raises(TypeError, match="must return tokens as a list of strings, got str"):
        ag.describe_samples(tmp_path / "ledger", lambda i: {"tokens": "text"})
