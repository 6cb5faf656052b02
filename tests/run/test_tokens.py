"""Scores of single tokens in a run, against the gradients of single tokens' losses, in a model whose tokens do not meet."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("pyarrow")
pytest.importorskip("duckdb")
import adam_ghost as ag
from adam_ghost import AdamState
from adam_ghost.demo.model import GPT
from adam_ghost.step.direction import form_direction, validation_gradient
from adam_ghost.step.validation import Validation

VOCABULARY = 19


class Apart(nn.Module):
    """Tokens do not meet: a token's loss is its own, and its gradient too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCABULARY, 12), nn.LayerNorm(12)
        self.up, self.head = nn.Linear(12, 24), nn.Linear(24, VOCABULARY)

    def forward(self, x):
        return self.head(F.gelu(self.up(self.norm(self.tokens(x)))))


def texts(n, length, seed):
    return torch.randint(0, VOCABULARY, (n, length + 1), generator=torch.Generator().manual_seed(seed))


def token_losses(model, x):
    """``[n, T]``"""
    return F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none")


def train(folder, model, batches, schedule="midpoint", optimizer=None, **options):
    """Trains on steps of micro-batches ``(ids, x, offsets)``.

    Returns by step what the loss of each token of each sample says, ``{(step, id): [T]}``, and the run.
    """
    model = model.double()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    val = lambda: token_losses(model, texts(4, 6, 99)).mean()  # noqa: E731
    expected, now = {}, []

    def oracle(*_):
        named = dict(model.named_parameters())
        grads, state = {name: p.grad for name, p in named.items()}, AdamState.of(optimizer)
        recorder = run._schedule.recorder
        recording, recorder.recording = recorder.recording, None
        P = form_direction(
            state, named, grads, validation_gradient(state, named, grads, Validation(val, model), schedule), "secant"
        ).P
        for ids, x, offsets in now:
            with torch.enable_grad():
                losses = token_losses(model, x).flatten() / x[:, 1:].numel()
            found = []
            for loss in losses:
                gs = torch.autograd.grad(loss, named.values(), retain_graph=True)
                found.append(sum(float((P[name] * g).sum()) for name, g in zip(named, gs, strict=True)))
            offsets = range(0, len(found) + 1, len(found) // len(ids)) if offsets is None else offsets.tolist()
            for i, sample in enumerate(ids):
                expected[run.step + 1, sample] = found[offsets[i] : offsets[i + 1]]
        recorder.recording = recording

    optimizer.register_step_pre_hook(oracle)
    run = ag.InRun(model, optimizer, val, schedule, ledger=folder, **options)
    for step in batches:
        now[:] = step
        for ids, x, offsets in step:
            run.batch(ids, offsets)
            token_losses(model, x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    return expected, run


def read(folder):
    with ag.open_ledger(folder) as ledger:
        tokens = {(row["step"], row["sample"]): row["scores"] for row in ledger.tokens().to_pylist()}
        scores = {(row["step"], row["sample"]): row["score"] for row in ledger.scores().to_pylist()}
    return tokens, scores


def agree(tokens, expected, scores):
    assert tokens.keys() <= scores.keys()
    for key, found in tokens.items():
        # kept in float32, each rounded to half of its last place
        np.testing.assert_allclose(found, expected[key], rtol=2**-23, atol=1e-12 * np.abs(expected[key]).max())
        assert sum(found) == pytest.approx(scores[key], rel=0, abs=2**-23 * np.abs(found).sum())


@pytest.mark.parametrize("schedule", ["midpoint", "gauss"])
def test_tokens_of_every_other_step(tmp_path, schedule):
    torch.manual_seed(0)
    steps = [[([10 * s + i for i in range(3)], texts(3, 5, s), None)] for s in range(4)]
    expected, run = train(tmp_path / "ledger", Apart(), steps, schedule, tokens=2)
    tokens, scores = read(tmp_path / "ledger")
    assert sorted(tokens) == [(1 + s, 10 * s + i) for s in (0, 2) for i in range(3)] and len(scores) == 12
    assert [step.tokens for step in run.steps] == [3, 0, 3, 0]
    if schedule == "midpoint":  # gauss has two directions, which the oracle does not mix
        agree(tokens, expected, scores)
    for key, found in tokens.items():
        assert len(found) == 5 and sum(found) == pytest.approx(scores[key], rel=0, abs=2**-23 * np.abs(found).sum())


def test_chosen_samples_in_micro_batches_of_several_lengths(tmp_path):
    torch.manual_seed(0)
    steps = [[(["a", "b"], texts(2, 5, s), None), (["c", "d", "e"], texts(3, 7, 50 + s), None)] for s in range(3)]
    expected, _ = train(tmp_path / "ledger", Apart(), steps, tokens=["b", "e", "elsewhere"])
    tokens, scores = read(tmp_path / "ledger")
    assert sorted(tokens) == [(s, i) for s in (1, 2, 3) for i in "be"]
    agree(tokens, expected, scores)
    assert {len(v) for (_, i), v in tokens.items() if i == "e"} == {7}


def test_samples_packed_in_rows(tmp_path):
    torch.manual_seed(0)
    offsets = torch.tensor([0, 3, 4, 11, 14])  # two rows of seven: the third sample lies in both
    expected, _ = train(tmp_path / "ledger", Apart(), [[(list("abcd"), texts(2, 7, s), offsets)] for s in range(2)], tokens=1)
    tokens, scores = read(tmp_path / "ledger")
    assert [len(tokens[2, i]) for i in "abcd"] == [3, 1, 7, 3]
    agree(tokens, expected, scores)


def test_training_and_scores_stay_what_they_are(tmp_path):
    found = []
    for options in ({}, {"tokens": 1}):
        torch.manual_seed(0)
        model = GPT(VOCABULARY, 8, 2, 16, 2, 0.0)
        steps = [[(list(range(4)), texts(4, 8, s), None)] for s in range(3)]
        folder = tmp_path / str(len(found))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        val = partial(lambda m: token_losses(m, texts(4, 8, 99)).mean(), model)
        with ag.InRun(model, optimizer, val, ledger=folder, **options) as run:
            for ((ids, x, _),) in steps:
                run.batch(ids)
                token_losses(model, x).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(([p.detach().clone() for p in model.parameters()], read(folder)))
    (plain, (none, scores)), (same, (tokens, again)) = found
    assert all(torch.equal(p, q) for p, q in zip(plain, same, strict=True)) and not none
    assert len(tokens) == 12 and {len(v) for v in tokens.values()} == {8}
    size = max(map(abs, scores.values()))
    for key, score in scores.items():
        assert again[key] == pytest.approx(score, abs=1e-5 * size)
        assert sum(tokens[key]) == pytest.approx(again[key], abs=1e-5 * size)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"tokens": 0}, ValueError, "tokens must be a positive number of steps"),
        ({"tokens": True}, TypeError, "tokens must be a number of steps, or a list of sample ids, got bool"),
        ({"tokens": 1.5}, TypeError, "got float"),
        ({"tokens": [1.5]}, TypeError, "an id must be"),
        ({"tokens": 2, "schedule": "lookahead"}, ValueError, "tokens needs a schedule that keeps layer calls"),
        ({"tokens": 2, "ledger": None}, ValueError, "tokens needs ledger="),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_refused(tmp_path, options, error, says):
    model = Apart()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=says):
        ag.InRun(model, optimizer, lambda: token_losses(model, texts(2, 4, 0)).mean(), **{"ledger": tmp_path / "ledger"} | options)
    assert not (tmp_path / "ledger").exists()


def test_a_model_without_tokens_is_told_before_its_first_step(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    run = ag.InRun(model, optimizer, lambda: model(torch.ones(2, 3)).square().mean(), ledger=tmp_path / "ledger", tokens=5)
    run.batch([0, 1])
    model(torch.ones(2, 3)).square().mean().backward()
    with pytest.raises(
        ValueError, match="tokens cannot be scored: needs tokens at dimension 1 of every layer's output; '2' has none"
    ):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    run.close()


def test_samples_of_several_rows_are_refused(tmp_path):
    model = Apart()
    optimizer = torch.optim.AdamW(model.parameters())
    run = ag.InRun(model, optimizer, lambda: token_losses(model, texts(2, 4, 0)).mean(), ledger=tmp_path / "ledger", tokens=1)
    with pytest.raises(ValueError, match="tokens cannot be used with samples of several rows, got views=2"):
        run.batch([0, 1], views=2)
    run.close()
