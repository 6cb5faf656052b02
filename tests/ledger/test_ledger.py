"""What a run writes is what it scored, and every question asked of the ledger has the answer that numpy gives."""

import json

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("pyarrow")
duckdb = pytest.importorskip("duckdb")
import pyarrow.parquet as pq  # noqa: E402

import adam_ghost as ag  # noqa: E402

N, BATCH = 30, 5


class Run:
    """A small run with its ledger, and beside it the rows that it should hold."""

    def __init__(self, folder, steps=20, targets=1, name=int, losses=True, checkpoint_at=None, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, targets))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        x, y = torch.randn(N, 3), torch.randn(N, targets)

        def val_loss():
            found = (self.model(x[:7]) - y[:7]).square().mean(0)
            return found if targets > 1 else found.squeeze()

        self.rows = []
        self.run = ag.InRun(self.model, self.optimizer, val_loss, ledger=ag.LedgerWriter(folder, **options))
        for step in range(steps):
            if step == checkpoint_at:
                self.run.state_dict()
            self.run.epoch = step // 6
            ids = torch.randint(0, N, (BATCH,))
            self.run.batch([name(i) for i in ids.tolist()])
            each = (self.model(x[ids]) - y[ids]).square().mean(1) / BATCH
            if losses:
                self.run.losses(each)
            each.sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.rows.append(([name(i) for i in ids.tolist()], each.detach().numpy()))
        self.run.close()
        self.ledger = ag.open_ledger(folder)


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("name", [int, lambda i: f"doc'{i}"], ids=["integers", "strings"])
def test_tables(tmp_path, name, targets):
    made = Run(tmp_path, targets=targets, name=name, flush_rows=17)
    scores = made.ledger.sql("SELECT * FROM scores WHERE target = 0 ORDER BY step").to_pylist()
    expected = [
        (k + 1, k // 6, *row) for k, (ids, losses) in enumerate(made.rows) for row in zip(ids, losses.tolist(), strict=True)
    ]
    assert sorted((r["step"], r["epoch"], r["sample"], r["loss"]) for r in scores) == sorted(expected)
    steps = made.ledger.steps().to_pylist()
    assert len(steps) == 20 * targets
    for row in steps:
        record = made.run.steps[row["step"] - 1]
        k = row["target"]
        assert (row["score_sum"], row["total"], row["val_loss"]) == (record.score_sum[k], record.total[k], record.val_loss[k])
        assert row["lr"] == [0.01] and row["samples"] == BATCH and not row["skipped"] and row["coverage"] == 1
    found = made.run.scores()
    for k in range(targets):
        totals = made.ledger.totals(target=k).to_pandas().set_index("sample")
        of_target = found.total if targets == 1 else found.total[:, k]
        np.testing.assert_allclose(totals.loc[found.ids, "value"], of_target, rtol=1e-12, atol=1e-15)
        assert (totals.loc[found.ids, "n"].to_numpy() == found.steps).all()
        z = made.ledger.totals(target=k, value="standardized").to_pandas().set_index("sample")["value"]
        expected = found.standardized if targets == 1 else found.standardized[:, k]
        np.testing.assert_allclose(z.loc[found.ids], expected, rtol=1e-9, atol=1e-12)


def test_ranges_and_top(tmp_path):
    made = Run(tmp_path)
    frame = made.ledger.scores().to_pandas()
    late = made.ledger.totals(steps=(11, 15)).to_pandas().set_index("sample")["value"].sort_index()
    expected = frame[frame["step"].between(11, 15)].groupby("sample")["score"].sum()
    np.testing.assert_allclose(late, expected)
    assert late.index.tolist() == expected.index.tolist()
    for harmful in (False, True):
        ours = [(r["sample"], r["value"]) for r in made.ledger.top(4, harmful=harmful, value="total").to_pylist()]
        theirs = made.run.top(4, harmful=harmful, value="total")
        assert [i for i, _ in ours] == [i for i, _ in theirs]
        np.testing.assert_allclose([v for _, v in ours], [v for _, v in theirs])
    asked = made.run.top(4, value="total", steps=(11, 15))
    assert [i for i, _ in asked] == expected.sort_values(ascending=False).index[:4].tolist()
    np.testing.assert_allclose([v for _, v in asked], expected.sort_values(ascending=False)[:4])
    found = made.run.scores()
    best = np.argsort(-found.standardized)[:4]
    rows = made.ledger.top(4).to_pylist()
    assert [r["sample"] for r in rows] == [found.ids[i] for i in best]
    np.testing.assert_allclose([(r["value"], r["total"]) for r in rows], [(found.standardized[i], found.total[i]) for i in best])
    one = made.ledger.show(str(theirs[0][0]))
    assert one["total"] == pytest.approx(theirs[0][1]) and one["steps"].num_rows == (frame["sample"] == theirs[0][0]).sum()
    with pytest.raises(KeyError, match="no score of sample 999"):
        made.ledger.show(999)
    with pytest.raises(ValueError, match="value must be one of"):
        made.ledger.totals(value="mean")


def test_groups_and_their_uncertainty(tmp_path):
    made = Run(tmp_path, steps=60, describe=lambda i: {"group": "even" if i % 2 == 0 else "odd", "text": f"sample {i}"})
    frame = made.ledger.scores().to_pandas()
    frame["group"] = np.where(frame["sample"] % 2 == 0, "even", "odd")
    expected = frame.groupby("group")["score"].sum()
    for groups in (None, {i: "even" if i % 2 == 0 else "odd" for i in range(N)}):
        found = made.ledger.groups(groups, bootstrap=400).to_pandas().set_index("group")
        np.testing.assert_allclose(found["value"], expected.loc[found.index])
        assert found["samples"].to_dict() == frame.groupby("group")["sample"].nunique().to_dict()
        # the bootstrap's width against the sum's standard deviation over steps
        by_step = (
            frame.pivot_table(index="step", columns="group", values="score", aggfunc="sum").reindex(columns=found.index).fillna(0)
        )
        width = 2 * 1.96 * by_step.std(ddof=0) * len(by_step) ** 0.5
        np.testing.assert_allclose(found["high"] - found["low"], width, rtol=0.3)
    cumulative = made.ledger.by_step(bins=7).to_pandas().groupby("group")["value"].sum()
    np.testing.assert_allclose(cumulative, expected.loc[cumulative.index])
    partly = made.ledger.groups({1: "one"}).to_pandas().set_index("group")
    assert set(partly.index) == {"one", "(none)"}
    assert made.ledger.top(1)["text"][0].as_py().startswith("sample ")


def test_describing_afterwards(tmp_path):
    made = Run(tmp_path)
    assert made.ledger.groups(bootstrap=0)["group"].to_pylist() == ["(none)"]
    ag.describe_samples(tmp_path, {i: {"group": "all", "text": "\ud800<b>", "path": "a\udcff"} for i in range(N)})
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.groups(bootstrap=0)["group"].to_pylist() == ["all"]
        assert {(r["text"], r["path"]) for r in ledger.samples().to_pylist()} == {("\\ud800<b>", "a\\udcff")}
    ag.describe_samples(tmp_path, lambda i: {"group": str(i)})
    made.ledger.refresh()
    assert len(made.ledger.groups(bootstrap=0)) == made.ledger.totals().num_rows
    with pytest.raises(ValueError, match="colour"):
        ag.describe_samples(tmp_path, lambda i: {"colour": "red"})


def test_other_tools_open_the_files_as_they_are(tmp_path):
    made = Run(tmp_path, flush_rows=17)
    total = made.ledger.sql("SELECT sum(score) AS x FROM scores")["x"][0].as_py()
    assert len(list((tmp_path / "scores").iterdir())) > 3
    assert duckdb.sql(f"SELECT sum(score) FROM '{tmp_path}/scores/*.parquet'").fetchall()[0][0] == pytest.approx(total)
    pd, pl = pytest.importorskip("pandas"), pytest.importorskip("polars")
    assert pd.read_parquet(tmp_path / "scores")["score"].sum() == pytest.approx(total)
    assert pl.read_parquet(tmp_path / "scores/*.parquet")["score"].sum() == pytest.approx(total)
    assert pl.read_parquet(tmp_path / "steps/*.parquet").height == 20


def test_ranks_write_side_by_side(tmp_path):
    a, b = Run(tmp_path, steps=4, rank=0), Run(tmp_path, steps=4, rank=1)
    both = b.ledger.totals()["n"].to_numpy().sum()
    assert both == 2 * 4 * BATCH and len(a.rows) == 4


def test_metadata(tmp_path):
    made = Run(tmp_path, steps=2)
    assert made.ledger.run["settings"]["rule"] == "secant" and made.ledger.run["versions"]["torch"]
    (tmp_path / "run.json").unlink()
    assert ag.open_ledger(tmp_path).run["settings"]["schedule"] == "midpoint"
    assert b"adam_ghost" in pq.read_schema(next((tmp_path / "scores").iterdir())).metadata


def test_skipped_steps_are_booked(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=tmp_path) as run:
        for bad in (False, True, False):
            run.batch([0, 1])
            (model(torch.randn(2, 3)).square().mean() * (float("inf") if bad else 1)).backward()
            run._before_step(optimizer, (optimizer,), {})
            optimizer.zero_grad()
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.steps()["skipped"].to_pylist() == [False, True, False]
        assert ledger.scores().num_rows == 4


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [([(0, 1)] * BATCH, TypeError, "integers or all strings"), ([0, 1, 2, "3", 4], TypeError, "integers or all strings")],
    ids=["tuples", "mixed"],
)
def test_bad_ids(tmp_path, ids, error, says):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with (
        ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=tmp_path) as run,
        pytest.raises(error, match=says),
    ):
        run.batch(ids)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_earlier_run_is_not_written_over(tmp_path, checkpointed):
    """Refused at once where nothing can be gone on with; else with the first batch, before which a checkpoint may be loaded."""
    first = Run(tmp_path, steps=3, checkpoint_at=2 if checkpointed else None)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    build = lambda: ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=tmp_path)  # noqa: E731
    kept = []
    for _ in range(2):  # what was refused holds neither the folder nor the model
        if checkpointed:
            with build() as run, pytest.raises(ValueError, match="holds the ledger of an earlier run"):
                run.batch([0, 1])
        else:
            with pytest.raises(ValueError, match="holds the ledger of an earlier run") as refused:
                build()
            kept.append(refused)
        assert not optimizer._optimizer_step_pre_hooks and not model._forward_hooks
    assert first.ledger.scores().num_rows == 3 * BATCH
    again = Run(tmp_path, steps=2, restart=True)
    assert again.ledger.scores().num_rows == 2 * BATCH


def test_bad_arguments(tmp_path):
    (tmp_path / "file").write_text("")
    for options, says in (
        ({"on_error": "ignore"}, "on_error"),
        ({"flush_rows": 0}, "flush_rows"),
        ({"folder": tmp_path / "file"}, "file"),
    ):
        with pytest.raises(ValueError, match=says):
            ag.LedgerWriter(**{"folder": tmp_path / "x", **options})
    with pytest.raises(FileNotFoundError, match="no ledger"):
        ag.open_ledger(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        ag.open_ledger(tmp_path)


def test_a_ledger_of_another_format_is_named(tmp_path):
    Run(tmp_path, steps=1).ledger.close()
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match=r"is of format 1, and this version of adam_ghost reads format \d"):
        ag.open_ledger(tmp_path)


def test_nothing_written_yet(tmp_path):
    writer = ag.LedgerWriter(tmp_path)
    writer.begin([], dict)
    writer.close()
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.totals().num_rows == ledger.steps().num_rows == ledger.by_step().num_rows == ledger.groups().num_rows == 0
