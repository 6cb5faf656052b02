"""Drawing by running scores: whose share is how large, and that it goes on where it stopped."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import adam_ghost
from adam_ghost.run.totals import SampleScores
from adam_ghost.use import AttributionSampler


def scored(values):
    values = np.array(values)
    return SampleScores(list(range(len(values))), values, values, np.ones(len(values), dtype=np.int64))


def sampler(scores, n, seed=0, **options):
    return AttributionSampler(scores, range(n), generator=torch.Generator().manual_seed(seed), **options)


def test_who_is_drawn_how_often():
    s = sampler(scored([1.0, 0.0, -20.0]), 4, floor=0.2, strength=2.0, num_samples=40_000)
    w = np.array([np.exp(2.0), 1.0, np.exp(-40.0), 1.0])  # the fourth was never scored: as the mean
    expected = 0.05 + 0.8 * w / w.sum()
    np.testing.assert_allclose(s.probabilities().numpy(), expected, rtol=1e-12)
    share = np.bincount(list(s), minlength=4) / 40_000
    assert np.all(np.abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 40_000))  # normal: 1e-5 each


def test_places_are_not_ids():
    scores = scored([3.0, -3.0])._replace(ids=["good", "bad"])
    p = AttributionSampler(scores, ["bad", "unknown", "good"]).probabilities()
    assert p[2] > p[1] > p[0]


def loop(steps, run_of, seed=3):
    """A training whose batches a sampler draws by the very scores of the training; what was drawn, and the sampler."""
    torch.manual_seed(seed)
    x, rule = torch.randn(40, 6), torch.randn(6, 3)
    y = (x @ rule).argmax(1)
    y[:10] = (y[:10] + 1) % 3
    model = nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = adam_ghost.InRun(model, optimizer, lambda: F.cross_entropy(model(x[20:]), y[20:]))
    return run_of(run, model, optimizer, x, y, steps)


def draws(run, model, optimizer, x, y, steps, cut=None):
    """``steps`` epochs of 8 batches of 5; at batch ``cut`` everything is saved and goes on in a new sampler."""
    s = sampler(run, len(x), refresh=7, strength=2.0)
    found, batches = [], 0
    while batches < 8 * steps:
        for ids in DataLoader(torch.arange(len(x)), 5, sampler=s):
            run.batch(ids)
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(ids.tolist())
            batches += 1
            if batches == cut:
                saved = io.BytesIO()
                torch.save(s.state_dict(), saved)
                s = sampler(run, len(x), seed=99, refresh=7, strength=2.0)
                s.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
                break
    run.close()
    return found, s


def test_a_live_run_steers_its_own_batches_and_goes_on_where_it_stopped():
    whole, s = loop(6, draws)
    assert loop(6, draws)[0] == whole  # the generator and the scores say everything
    for cut in (3, 8, 21):  # in an epoch, at its end, in a later one
        assert loop(6, lambda *a, cut=cut: draws(*a, cut=cut))[0] == whole
    counts = np.bincount(np.concatenate(whole[24:]), minlength=40)
    assert counts[:10].mean() < 0.8 * counts[10:].mean()  # the ten wrong labels
    assert s.probabilities().min() >= 0.2 / 40


def test_an_epoch_that_was_left_does_not_go_on():
    s = sampler(scored(np.zeros(6)), 6)
    next(iter(s))
    assert len(list(s)) == 6 == len(s)


def test_what_workers_drew_ahead_comes_again():
    s = sampler(scored(np.zeros(50)), 50, refresh=8)
    it = iter(s)
    first = [next(it) for _ in range(30)]
    state = s.state_dict(trained=20)
    rest = list(it)
    again = sampler(scored(np.zeros(50)), 50, seed=5, refresh=8)
    again.load_state_dict(state)
    assert list(again) == first[20:] + rest
    assert len(list(again)) == 50
    with pytest.raises(ValueError, match="trained must be at most what this epoch has drawn, 50, got 51"):
        again.state_dict(trained=51)
    with pytest.raises(ValueError, match=r"state must be what AttributionSampler\.state_dict"):
        again.load_state_dict({"given": 3})


def test_of_a_ledger_that_grows(tmp_path):
    pytest.importorskip("duckdb")

    def of_ledger(run, model, optimizer, x, y, steps):
        writer = adam_ghost.LedgerWriter(tmp_path / "run")
        run.close()
        with adam_ghost.InRun(model, optimizer, lambda: F.cross_entropy(model(x[20:]), y[20:]), ledger=writer) as run:
            for start in range(0, 40, 10):
                ids = torch.arange(start, start + 10)
                run.batch(ids)
                F.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
                optimizer.zero_grad()
                if start == 10:
                    run.flush()
                    ledger = adam_ghost.open_ledger(tmp_path / "run")
                    by_ledger = sampler(ledger, 40)
                    assert len(by_ledger.probabilities().unique()) == 21  # 20 scored, the others alike
            run.flush()
            torch.testing.assert_close(by_ledger.probabilities(), sampler(run, 40).probabilities())
            torch.testing.assert_close(sampler(tmp_path / "run", 40).probabilities(), sampler(run, 40).probabilities())

    loop(1, of_ledger)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"floor": 0.0}, "floor must be above 0 and at most 1, got 0.0"),
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"refresh": 0}, "refresh must be at least 1"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"ids": [1, 1]}, "all different, got 2, 1 different"),
        ({"ids": []}, "ids must be one for each sample"),
    ],
)
def test_refuses(how, message):
    arguments = {"ids": [0, 1]} | how
    with pytest.raises(ValueError, match=message):
        AttributionSampler(scored([0.0, 1.0]), arguments.pop("ids"), **arguments)
