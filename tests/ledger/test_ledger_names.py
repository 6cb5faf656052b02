"""Names are names: of folders, of samples, of groups; and a writer is one run's."""

import csv
import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import made
from typer.testing import CliRunner

import adam_ghost as ag
from adam_ghost.cli import app
from adam_ghost.report import write_report

FOLDERS = ["exp[1]", "run*", "what?", "layers=[1,2]", "step=77", "sample=9", "target=1", "score=5", "back\\slash", "b\\[1]", "it's"]


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    for neighbour in ("exp1", "run1", "whatx", "b1"):  # what a pattern would find
        made.write(tmp_path / neighbour, seed=5)
    steps = made.write(tmp_path / name, seed=1)
    with ag.open_ledger(tmp_path / name) as ledger:
        found = ledger.totals().to_pylist()
        assert {r["sample"]: r["value"] for r in found} == pytest.approx(made.totals(steps))
        assert ledger.steps()["step"].to_pylist() == list(range(1, 16))
        assert ledger.scores()["step"].to_pylist() == [s for s in range(1, 16) for _ in range(made.BATCH)]
        write_report(ledger, tmp_path / name / "report.html")
    ag.describe_samples(tmp_path / name, lambda i: {"group": "all"})
    for command in ("top", "groups", "audit", "export"):
        done = CliRunner().invoke(app, [command, str(tmp_path / name)])
        assert done.exit_code == 0, done.output


def loop(folder, ids, **options):
    """A run of one step per batch of ``ids``; returns what was raised, and the steps that were made."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    made = 0
    with ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=ag.LedgerWriter(folder, **options)) as run:
        for batch in ids:
            try:
                run.batch(batch)
            except (TypeError, ValueError) as error:
                return error, made
            model(torch.randn(len(batch), 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            made += 1
    return None, made


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        ([0, 1], [2, 2**63], "64 bits"),
        ([0, 1], np.array([2, 2**64 - 1], dtype=np.uint64), "64 bits"),
        ([0, 1], [2, -(2**63) - 1], "64 bits"),
        (["a", "b"], ["c", "\udcff"], "valid Unicode"),
        ([0, 1], ["a", "b"], "int, as they were"),
        ([0, 1], [True, False], "bool"),
    ],
)
def test_ids_that_cannot_be_written_cost_nothing(tmp_path, good, bad, says):
    error, steps = loop(tmp_path, [good, good, bad])
    assert steps == 2 and says in str(error)
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.scores().num_rows == 4


def test_the_largest_ids_are_kept(tmp_path):
    assert loop(tmp_path, [[2**63 - 1, -(2**63)]]) == (None, 1)
    with ag.open_ledger(tmp_path) as ledger:
        assert sorted(ledger.totals()["sample"].to_pylist()) == [-(2**63), 2**63 - 1]


def test_descriptions_with_lone_surrogates_are_kept_apart(tmp_path):
    groups = {0: "\udcf1", 1: "\udcf2"}
    assert loop(tmp_path, [[0, 1]], describe=lambda i: {"group": groups[i], "path": groups[i], "text": groups[i]}) == (None, 1)
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.groups(bootstrap=0).num_rows == 2
        assert sorted(r["path"] for r in ledger.samples().to_pylist()) == ["\\udcf1", "\\udcf2"]


@pytest.mark.parametrize(("bad", "says"), [({"image": "png"}, "image as bytes"), ({"colour": 1}, "colour")])
def test_descriptions_that_cannot_be_written_cost_nothing(tmp_path, bad, says):
    error, steps = loop(tmp_path, [[0, 1], [2, 3]], describe=lambda i: bad if i == 2 else {})
    assert steps == 1 and says in str(error)
    with ag.open_ledger(tmp_path) as ledger:
        assert ledger.scores().num_rows == 2


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    writer = ag.LedgerWriter("ledger")
    for number in (1, 2):
        found = made.step(number)
        writer.begin(found.ids, dict)
        writer.add(found)
        writer.flush()
        os.chdir(tmp_path / "b")
    writer.close()
    assert not list((tmp_path / "b").iterdir())
    with ag.open_ledger(tmp_path / "a/ledger") as ledger:
        assert ledger.steps()["step"].to_pylist() == [1, 2]


def make_run(writer):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    return model, optimizer, ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).sum(), ledger=writer)


def test_a_writer_is_one_runs(tmp_path):
    writer = ag.LedgerWriter(tmp_path, flush_rows=1)
    _, _, run = make_run(writer)
    with pytest.raises(RuntimeError, match="another run's"):
        make_run(writer)
    run.close()
    with pytest.raises(RuntimeError, match="is closed"):
        make_run(writer)
    found = made.step(1)
    for call in (lambda: writer.begin(found.ids, dict), lambda: writer.add(found)):
        with pytest.raises(RuntimeError, match="is closed"):
            call()
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if "ledger" in t.name]


def test_links_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "ledger"
    folder.mkdir()
    for make in (os.symlink, os.link):
        make(precious, folder / "r0.lock")
        with pytest.raises(ValueError, match=r"r0.lock is (a symbolic link|linked)"):
            ag.LedgerWriter(folder)
        (folder / "r0.lock").unlink()
    made.write(folder)
    for name, write in (("report.html", write_report), ("scores.csv", None)):
        os.symlink(precious, folder / name)
        if write is not None:
            with pytest.raises(ValueError, match="symbolic link"):
                write(folder, folder / name)
        command = ["report", str(folder)] if write else ["export", str(folder), "--csv", str(folder / name)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 2 and "symbolic link" in done.output
    assert precious.read_text() == "mine"


def test_spreadsheets_find_no_formulas(tmp_path):
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\uff1d1", "plain", "a=b"]
    made.write(tmp_path / "x", ids=range(len(names)), name=names.__getitem__, parts=10)
    for option, expected in (([], [f"'{n}" for n in names[:-2]] + names[-2:]), (["--raw"], names)):
        for every in ([], ["--every-score"]):
            done = CliRunner().invoke(app, ["export", str(tmp_path / "x"), "--csv", str(tmp_path / "x.csv"), *option, *every])
            assert done.exit_code == 0, done.output
            with (tmp_path / "x.csv").open(newline="") as f:
                assert {row["sample"] for row in csv.DictReader(f)} == set(expected)
