"""The evidence: its own arithmetic against torch's, the rivals against each other, and the whole of it at its smallest."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adam_ghost as ag
from adam_ghost.demo.model import GPT
from bench.evidence import measure, one_step, page, pictures, rivals, scoring, sources, studies
from bench.evidence.tasks import digits
from bench.statistics import auroc, interval, precision

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("clip", [None, 0.1])
def test_many_models_train_as_one_does(clip):
    task = digits(0, epochs=1)
    task.clip, task.decay = clip, 0.1
    together = task.train(task.start(2), 1, 5)
    optimizer = task.optimizer()
    for index in task.batches[:5]:
        task.loss(task.take(index)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(task.model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in task.model.named_parameters():
        for w in together.w[name]:
            torch.testing.assert_close(w, p.detach(), rtol=1e-10, atol=1e-12)


def test_models_with_batches_of_their_own():
    task = digits(0, epochs=1)
    swapped = torch.stack([task.batches[0], task.batches[1]])
    own = task.train(task.start(2), 1, 1, batches=lambda t: swapped)
    alone = task.train(task.start(1), 1, 1)
    for name, w in own.w.items():
        torch.testing.assert_close(w[0], alone.w[name][0])
        assert not torch.equal(w[0], w[1])


def test_chosen_batches_are_full_and_hold_nothing_else():
    task = digits(0)
    keep = torch.zeros(1000, dtype=torch.bool)
    keep[:130] = True
    drawn = task.choosing(keep, seed=1)
    assert len(drawn) == len(task.batches) and {len(b) for b in drawn} == {50}
    counts = torch.cat(drawn).bincount(minlength=1000)
    assert counts[130:].sum() == 0 and counts[:130].max() - counts[:130].min() <= 1


def test_the_game_of_the_true_step():
    """Values add up to what the whole batch takes off, and the grand coalition's weights are the optimizer's own."""
    task = digits(0, batch=8, held_out=16)
    optimizer = task.optimizer()
    for index in task.batches[:3]:
        optimizer.zero_grad()
        task.loss(task.take(index)).backward()
        shares = one_step.shares_of(task, task.take(index), 0)
        if optimizer.state:
            game = one_step.Game(task, optimizer, shares)
        optimizer.step()
    after = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    torch.testing.assert_close(game.stepped(shares.sum(0)), after, rtol=1e-12, atol=1e-14)
    nobody, everyone = game.losses(torch.stack([game.nobody, after]))
    truths, error = game.truths(seed=0)
    torch.testing.assert_close(truths["true step"].sum(), nobody - everyone, rtol=1e-9, atol=1e-12)
    assert 0 < error < 0.2
    additive = game.nobody + game.singles.sum(0)
    torch.testing.assert_close(truths["paper's game"].sum(), nobody - game.losses(additive[None])[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in rivals.RIVALS if rivals.installed(n)])
def test_rivals_score_what_the_sgd_rule_does(name):
    torch.manual_seed(0)
    model = GPT(65, 16, layers=2, width=32, heads=2)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())  # dots in the pass miss what tied layers share
    x, x_val = torch.randint(0, 65, (8, 17)).split([6, 2])
    cache = ag.LayerCache(model, lambda: rivals._losses(model, x_val).mean())
    with cache:
        rivals._losses(model, x).mean().backward()
    expected = ag.attribute(cache, torch.optim.SGD(model.parameters(), lr=1.0), rule="sgd", at="current")
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scores = rivals.RIVALS[name](model)(x, x_val)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    if "opacus" not in name:  # which trains a copy with a head of its own
        for p, g in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_statistics():
    bad = torch.tensor([True, False, False, True])
    assert auroc(torch.tensor([0.0, 1.0, 2.0, 1.0]), bad) == 0.875
    assert precision(torch.tensor([0.0, 1.0, 2.0, 3.0]), bad) == 0.5
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and math.isclose(half, 4.30 / 3**0.5) and math.isnan(interval([1.0])[1])


def test_sentences_follow_the_numbers():
    told = {"behind": 0.3, "behind_half": 0.1}
    assert page.verdict(told) == "more by .30 +- .10"
    assert page.verdict({**told, "behind": -0.3}) == "less by .30 +- .10"
    assert page.verdict({**told, "behind_half": 0.4}).startswith("no difference told")
    assert page.number(0.9996, 3) == ".999" and page.number(1.0, 3) == "1.000" and page.number(-0.25) == "-.25"


def test_the_page_advises_what_was_told_to_be_better():
    def cell(mean, behind=None):
        return {"mean": mean, "half": 0.1} | ({} if behind is None else {"behind": behind, "behind_half": 0.1})

    default = scoring.DEFAULT
    ways = {default: {m: cell(0.5) for m in page.MEASURES}, "other": {m: cell(0.9, -0.4) for m in page.MEASURES}}
    (row,) = (line for line in page.decisions({"the run": {"digits": ways}}).splitlines() if "find bad samples" in line)
    assert row == "| find bad samples: digits | other | AUROC .90 +- .10 | better than the default: other (.90 +- .10) |"
    ways["other"]["AUROC"] = cell(0.55, -0.05)
    (row,) = (line for line in page.decisions({"the run": {"digits": ways}}).splitlines() if "find bad samples" in line)
    assert row == "| find bad samples: digits | `window`, 32 and 32 ahead | AUROC .50 +- .10 | nothing told to be better |"


def test_nothing_on_the_frontier_is_beaten():
    runs = {"digits": {w: {"LDS": {"mean": y}} for w, y in (("a", 0.2), ("b", 0.8))}}
    assert pictures.frontier(runs, {"of_plain": {"plain": 1.0, "a": 0.9, "b": 0.5}}) == {"a": (0.9, 0.2), "b": (0.5, 0.8)}


def test_questions_are_as_long_as_their_source():
    import random

    text = "the value of self is in this class"
    for kind in sources.KINDS:
        assert len(sources.asked(text, kind, random.Random(0))) == len(text)
    found = sources.lexical([text, "something else entirely, quite"], [text])
    assert found[0, 0] == pytest.approx(1) and found[1, 0] < 0.5


def test_cells_have_names_of_their_own():
    for quick in (False, True):
        names = [c.name for s in studies.STUDIES for c in s.cells(quick)]
        assert len(names) == len(set(names)) > 0


def test_what_was_cut_off_goes_on(tmp_path, monkeypatch):
    (study,) = (s for s in studies.STUDIES if s.name == "one step")
    cell = study.cells(True)[0]
    measure._path(tmp_path, cell).write_text(
        json.dumps({"code": measure.code(), "cell": cell.name, "result": {"rows": []}, "seconds": 1})
    )
    assert measure._kept(tmp_path, cell, measure.code())["result"] == {"rows": []}
    assert measure._kept(tmp_path, cell, "other sources") is None


def test_the_whole_evidence_at_its_smallest(tmp_path):
    command = [sys.executable, "-m", "bench", "evidence", "--quick", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "evidence.json").read_text())["studies"]
    assert found["one step"]["from step 10"]["true step"]["midpoint"]["r"] > 0.999
    assert found["steps later"]["digits, lr 0.001, beta2 0.999"]["window"]["K=30"]["r_worst"] > 0.98
    lds = {way: of["LDS"]["mean"] for way, of in found["the run"]["digits"].items()}
    assert max(lds, key=lds.get) == "windows of 32, 32 ahead" and lds["windows of 32, 32 ahead"] > 0.9
    text = (tmp_path / "evidence.md").read_text(encoding="utf-8")
    for part in (
        "## One step",
        "## Steps later",
        "## The run",
        "## Training again on the best",
        "## What each way costs",
        "## What it costs",
    ):
        assert part in text
    assert "Not measured here: queries" in text
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)  # everything is there already
    assert again.returncode == 0, again.stderr[-2000:]
