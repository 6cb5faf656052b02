"""The exact game against its own definition, and the method against the game."""

import itertools
import math
import pydoc_data.topics

import pytest
import torch
from models import SEQUENCES, D, Fn, problem
from oracles import close, gradients_one_by_one
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag


class Game:
    """U(S), each time by the optimizer's own step with the gradient of the samples in S."""

    def __init__(self, case):
        self.case, self.gradients = case, gradients_one_by_one(case)
        self.final = {k: p.grad for k, p in case.params.items()}
        self.held = {k: p.detach().clone() for k, p in case.params.items()}
        self.empty = self.loss(())

    def loss(self, samples):
        for k, p in self.case.params.items():
            p.grad = sum((self.gradients[i][k] for i in samples), torch.zeros_like(p))
        after = self.case.after_step(1.0)
        for k, p in self.case.params.items():
            p.data.copy_(after[k])
        with torch.no_grad():
            loss = self.case.val_loss()
        for k, p in self.case.params.items():
            p.data.copy_(self.held[k])
            p.grad = self.final[k]
        return loss

    def utility(self, samples):
        return self.empty - self.loss(samples)

    def values(self):
        """By all orders."""
        n = self.case.n
        U = {s: self.utility(s) for r in range(n + 1) for s in itertools.combinations(range(n), r)}
        values = torch.zeros(n, dtype=torch.float64)
        for order in itertools.permutations(range(n)):
            for k, i in enumerate(order):
                values[i] += U[tuple(sorted(order[: k + 1]))] - U[tuple(sorted(order[:k]))]
        return values / math.factorial(n)


def small(n, name="nanogpt"):
    return problem(*SEQUENCES[name], n=n, T=3).warm().record()


@pytest.mark.parametrize("n", [1, 2])
def test_all_orders(n):
    """One order with its reverse is all there are."""
    case = small(n)
    result = ag.exact_shapley(case.cache, case.optimizer, permutations=1)
    close(result.values, Game(case).values(), 1e-9)
    assert result.standard_error.isnan().all()


@pytest.mark.parametrize("name", ["nanogpt", "relative-bias"])
def test_sampled_orders(name):
    case = small(4, name)
    before = [p.detach().clone() for p in case.model.parameters()]
    result = ag.exact_shapley(case.cache, case.optimizer, permutations=60, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), before, strict=True))
    game = Game(case)
    everyone = game.utility(range(4))
    assert ((result.values - game.values()).abs() <= 4 * result.standard_error + 1e-12 * everyone.abs()).all()
    assert result.standard_error.max() < 0.1 * result.values.abs().max()
    close(result.values.sum(), everyone, 1e-9)
    close(result.total, everyone, 1e-9)
    alone = [everyone - game.utility([j for j in range(4) if j != i]) for i in range(4)]
    close(result.leave_one_out, torch.stack(alone), 1e-9)
    assert result.evaluations == 2 * 60 * 3 + 4 + 2
    again = ag.exact_shapley(case.cache, case.optimizer, permutations=60, seed=1)
    assert torch.equal(again.values, result.values)


def test_targets():
    case = small(3)
    alone = []
    loss = case.val_loss
    for k in range(2):
        case.cache.validation.val_loss = lambda k=k: loss() * (k + 1)
        alone.append(ag.exact_shapley(case.cache, case.optimizer, permutations=2).values)
    case.cache.validation.val_loss = lambda: torch.stack([loss(), 2 * loss()])
    result = ag.exact_shapley(case.cache, case.optimizer, permutations=2)
    close(result.values, torch.stack(alone, 1), 1e-12)
    assert result.values.shape == result.standard_error.shape == result.leave_one_out.shape == (3, 2)
    assert result.total.shape == (2,)


def test_weights_come_back_when_val_loss_fails():
    case = small(3)
    before = [p.detach().clone() for p in case.model.parameters()]
    countdown = iter([1, 1, 1])
    loss = case.val_loss
    case.cache.validation.val_loss = lambda: loss() * next(countdown)
    with pytest.raises(StopIteration):
        ag.exact_shapley(case.cache, case.optimizer)
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), before, strict=True))


def test_compare():
    result = ag.ShapleyValues(torch.tensor([1.0, 2.0, 4.0]).double(), None, None, None, 0)
    r, error = result.compare(torch.tensor([2.0, 4.0, 8.0]))
    assert r == pytest.approx(1.0) and error == pytest.approx(1.0)
    assert result.compare(torch.tensor([-1.0, -2.0, -4.0])) == (pytest.approx(-1.0), pytest.approx(2.0))


class Characters(nn.Module):
    """A small language model over a window of characters."""

    def __init__(self, vocabulary, context, d=16):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(context, d)
        self.attention, self.norm = nn.MultiheadAttention(d, 2, batch_first=True), nn.LayerNorm(d)
        self.mlp, self.head = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)), nn.Linear(d, vocabulary)

    def forward(self, i):
        T = i.shape[1]
        x = self.tokens(i) + self.positions(torch.arange(T))
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.head(x + self.mlp(self.norm(x)))


def test_the_method_on_a_language_model():
    """After some steps the secant at the midpoint is the game's value; the paper's rule and the SGD rule are further off."""
    text = "\n".join(pydoc_data.topics.topics.values())[:20000].lower()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    generator = torch.Generator().manual_seed(0)

    def batch(n, where):
        at = torch.randint(*where, (n,), generator=generator)
        return torch.stack([data[i : i + 17] for i in at])

    torch.manual_seed(0)
    model = Characters(len(characters), 16).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    held_out = batch(16, (15000, 19900))
    loss = lambda x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())  # noqa: E731
    cache = ag.LayerCache(model, lambda: loss(held_out), strict=True)
    found = {}
    for step in range(31):
        x = batch(16, (0, 14900))
        with cache:
            optimizer.zero_grad()
            loss(x).backward()
        if step in (10, 30):
            game = ag.exact_shapley(cache, optimizer, permutations=8)
            for name, (rule, at) in {
                "ours": ("secant", "midpoint"), "paper": ("frozen", "current"), "sgd": ("sgd", "current")
            }.items():  # fmt: skip
                found[name, step] = game.compare(ag.attribute(cache, optimizer, rule=rule, at=at))
            scores = ag.attribute(cache, optimizer)
            assert float(scores.sum()) == pytest.approx(float(game.total), rel=0.02)
        optimizer.step()
    for step in (10, 30):
        r, error = found["ours", step]
        assert r >= 0.999 and error <= 0.02, found
        for other in ("paper", "sgd"):
            assert found[other, step][0] < r and found[other, step][1] > 5 * error, found


@pytest.mark.parametrize("at, order", [("midpoint", 3), ("gauss", 5)])
def test_sum_of_scores_is_the_steps_loss_change(at, order):
    """Up to the order of the quadrature in lr: halving lr divides the difference by two to its power, at least."""
    gaps = []
    for lr in (0.2, 0.1, 0.05) if at == "gauss" else (4e-3, 2e-3, 1e-3):
        case = problem(lambda: Fn(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2)), "x").warm()
        for group in case.optimizer.param_groups:
            group["lr"] = lr
        case.record()
        gaps.append(float((case.attribute(at=at).sum() - Game(case).utility(range(case.n))).abs()))
    assert all(big / less > 0.75 * 2**order for big, less in itertools.pairwise(gaps)), gaps
