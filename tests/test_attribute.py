"""The thin layer on a small network: the exact game, pairwise products, what it leaves behind, and what bad input gets."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.model import GPT

VOCABULARY, CONTEXT = 17, 8


def tokens(n, seed):
    return torch.randint(0, VOCABULARY, (n, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


class Setup:
    """A GPT with tied embeddings after some steps of AdamW, with one more backward pass recorded."""

    def __init__(self, n=5, steps=12, dtype=torch.float64, dropout=0.0, lr=1e-3, val=None):
        torch.manual_seed(0)
        self.model = GPT(VOCABULARY, CONTEXT, 1, 16, 2, dropout).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.cache = ag.LayerCache(self.model, val or partial(loss_of, self.model, tokens(6, 99)))
        for step in range(steps):
            loss_of(self.model, tokens(n, step)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x = tokens(n, 50)
        self.record()

    def record(self):
        with self.cache:
            loss_of(self.model, self.x).backward()

    def sample_gradients(self):
        """[n, parameters]: one sample at a time."""
        n = len(self.x)
        params = list(self.model.parameters())
        rows = [torch.autograd.grad(loss_of(self.model, self.x[i : i + 1]) / n, params) for i in range(n)]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_exact_shapley_is_the_mean_over_all_orders():
    s = Setup(n=4)
    G = s.sample_gradients()
    state = ag.AdamState.of(s.optimizer)
    params = list(s.model.parameters())
    start = copy.deepcopy(s.model.state_dict())

    def loss_after(samples):
        total = G[list(samples)].sum(0).split([p.numel() for p in params])
        moved = [state.weights(p, g.view_as(p)) for p, g in zip(params, total, strict=True)]
        before = [p.data.clone() for p in params]
        for p, w in zip(params, moved, strict=True):
            p.data.copy_(w)
        loss = s.cache.validation.val_loss().item()
        for p, w in zip(params, before, strict=True):
            p.data.copy_(w)
        return loss

    worth = {c: loss_after(()) - loss_after(c) for r in range(5) for c in itertools.combinations(range(4), r)}
    want = torch.zeros(4, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        for k, i in enumerate(order):
            want[i] += (worth[tuple(sorted(order[: k + 1]))] - worth[tuple(sorted(order[:k]))]) / math.factorial(4)
    game = ag.exact_shapley(s.cache, s.optimizer, permutations=300)
    assert ((game.values - want).abs() <= 5 * game.standard_error + 1e-12).all()
    torch.testing.assert_close(game.values.sum(), game.total, rtol=1e-10, atol=0)
    everyone = worth[(0, 1, 2, 3)]
    assert float(game.total) == pytest.approx(everyone, rel=1e-9)
    without = [worth[tuple(j for j in range(4) if j != i)] for i in range(4)]
    torch.testing.assert_close(game.leave_one_out, everyone - torch.tensor(without, dtype=torch.float64), rtol=1e-8, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(start.values(), s.model.state_dict().values(), strict=True))


def test_game_of_one_sample():
    s = Setup(n=1)
    game = ag.exact_shapley(s.cache, s.optimizer, permutations=1)
    torch.testing.assert_close(game.values[0], game.total)
    torch.testing.assert_close(ag.attribute(s.cache, s.optimizer)[0].double(), game.total, rtol=1e-3, atol=0)


def test_method_agrees_with_the_exact_game_and_beats_its_predecessors():
    s = Setup(n=16, steps=30)
    game = ag.exact_shapley(s.cache, s.optimizer, permutations=12)
    ours = game.compare(ag.attribute(s.cache, s.optimizer))
    paper = game.compare(ag.attribute(s.cache, s.optimizer, rule="frozen", at="current"))
    sgd = game.compare(ag.attribute(s.cache, s.optimizer, rule="sgd", at="current"))
    assert ours[0] >= 0.999 and ours[1] <= 0.02
    assert ours[1] < paper[1] < sgd[1]


@pytest.mark.parametrize("preconditioner", ["exact", None])
def test_gram_is_that_of_materialised_gradients(preconditioner):
    s = Setup()
    G = s.sample_gradients()
    state = ag.AdamState.of(s.optimizer)
    D = torch.cat([(state.scaling(p, p.grad) * state[p].scalars.lr).flatten() for p in s.model.parameters()])
    want = (G if preconditioner is None else G * D) @ G.T
    torch.testing.assert_close(ag.gram(s.cache, s.optimizer, preconditioner=preconditioner), want, rtol=1e-10, atol=1e-16)


def test_factored_gram_is_exact_for_a_rank_one_preconditioner():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, betas=(0.0, 0.5))
    cache = ag.LayerCache(layer)
    layer(torch.randn(5, 7, 4, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with cache:
        layer(torch.randn(5, 7, 4, dtype=torch.float64)).square().mean().backward()
    r, c = torch.rand(3, 1, dtype=torch.float64) + 1, torch.rand(1, 4, dtype=torch.float64) + 1
    optimizer.state[layer.weight]["exp_avg_sq"].copy_((r * c * 1e6) ** 2)  # so large that g hardly counts
    exact = ag.gram(cache, optimizer)
    torch.testing.assert_close(ag.gram(cache, optimizer, preconditioner="factored"), exact, rtol=1e-6, atol=0)


def test_targets_and_tokens():
    single = Setup()
    first = ag.attribute(single.cache, single.optimizer)
    per_token = ag.attribute(single.cache, single.optimizer, per_token=True)
    assert per_token.shape == (5, CONTEXT)
    torch.testing.assert_close(per_token.sum(1), first)
    both = Setup()
    both.cache.validation.val_loss = lambda: torch.stack(
        [loss_of(both.model, tokens(6, 99)), 2 * loss_of(both.model, tokens(3, 98))]
    )
    scores = ag.attribute(both.cache, both.optimizer)
    assert scores.shape == (5, 2)
    torch.testing.assert_close(scores[:, 0], first)
    assert ag.attribute(both.cache, both.optimizer, per_token=True).shape == (5, CONTEXT, 2)


@pytest.mark.parametrize("fails", [None, "forward", "val_loss"])
def test_everything_is_as_before(fails):
    def val():
        if fails == "val_loss":
            raise KeyError("mine")
        return loss_of(s.model.eval(), tokens(2, 7)) + torch.rand(()) * s.model.norm.bias.sum()

    def trace(record):
        """Everything a step leaves behind."""
        torch.manual_seed(4)
        s.optimizer.zero_grad()
        if record:
            record()
        else:
            loss_of(s.model.train(), s.x).backward()
        grads = [p.grad.clone() for p in s.model.parameters()]
        state = [copy.deepcopy(x) for st in s.optimizer.state.values() for x in st.values()]
        modes = [torch.tensor(m.training) for m in s.model.modules()]
        return [*grads, *(p.detach().clone() for p in s.model.parameters()), *state, *modes, torch.get_rng_state()]

    s = Setup(dropout=0.2, val=val)
    hooks = lambda: [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in s.model.modules()]  # noqa: E731
    clean = hooks()
    plain = trace(None)

    def record():
        s.cache.clear()
        if fails == "forward":
            with pytest.raises(KeyError, match="mine"), s.cache:
                loss_of(s.model.train(), s.x)
                raise KeyError("mine")
            torch.manual_seed(4)
            loss_of(s.model, s.x).backward()
            return
        s.model.train()
        s.record()
        if fails == "val_loss":
            with pytest.raises(KeyError, match="mine"):
                ag.attribute(s.cache, s.optimizer)
        else:
            ag.attribute(s.cache, s.optimizer)
            ag.gram(s.cache, s.optimizer)
            ag.exact_shapley(s.cache, s.optimizer, permutations=1)

    ours = trace(record)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert hooks() == clean


BAD = {
    "rule": (lambda s: ag.attribute(s.cache, s.optimizer, rule="adam"), ValueError, "rule must be one of secant"),
    "at": (lambda s: ag.attribute(s.cache, s.optimizer, at="end"), ValueError, "at must be one of midpoint"),
    "optimizer": (lambda s: ag.attribute(s.cache, torch.optim.SGD(s.model.parameters())), TypeError, "SGD"),
    "cache": (lambda s: ag.attribute(s.model, s.optimizer), TypeError, "layer_cache must be an adam_ghost.LayerCache, got GPT"),
    "foreign": (
        lambda s: ag.attribute(s.cache, torch.optim.AdamW(s.model.norm.parameters())),
        ValueError,
        "'tokens.weight' has a gradient but is not among",
    ),
    "no-val": (lambda s: (setattr(s.cache.validation, "val_loss", None), ag.attribute(s.cache, s.optimizer)), ValueError, "val_loss="),
    "val-no-graph": (lambda s: with_val(s, lambda: torch.zeros(())), ValueError, "without a graph"),
    "val-shape": (lambda s: with_val(s, lambda: s.model.tokens.weight), ValueError, r"got shape \[17, 16\]"),
    "val-type": (lambda s: with_val(s, lambda: 1.0), TypeError, "must return a tensor"),
    "val-nan": (lambda s: with_val(s, lambda: s.model.tokens.weight.sum() * float("nan")), ValueError, "val_loss is not finite"),
    "grad-inf": (
        lambda s: (s.model.norm.bias.grad.fill_(float("inf")), ag.attribute(s.cache, s.optimizer)),
        ValueError,
        "gradient of 'norm.bias' is not finite",
    ),
    "no-grad": (lambda s: (s.optimizer.zero_grad(), ag.attribute(s.cache, s.optimizer)), ValueError, "before optimizer.zero_grad"),
    "nothing": (lambda s: (s.cache.clear(), ag.attribute(s.cache, s.optimizer)), ValueError, "nothing was recorded"),
    "repeated": (lambda s: s.record(), ValueError, "entered again before its recording was used"),
    "nested": (lambda s: nested(s), ValueError, "cannot be nested"),
    "inside": (lambda s: inside(s), ValueError, "after the `with cache` block"),
    "preconditioner": (lambda s: ag.gram(s.cache, s.optimizer, preconditioner="full"), ValueError, "preconditioner must be"),
    "permutations": (lambda s: ag.exact_shapley(s.cache, s.optimizer, permutations=0), ValueError, "at least 1, got 0"),
    "model": (lambda s: ag.LayerCache(print), TypeError, "model must be a torch.nn.Module"),
    "val-callable": (lambda s: ag.LayerCache(s.model, 3), TypeError, "val_loss must be callable"),
}


def with_val(s, val):
    s.cache.validation.val_loss = val
    return ag.attribute(s.cache, s.optimizer)


def nested(s):
    s.cache.clear()
    with s.cache, s.cache:
        pass


def inside(s):
    s.cache.clear()
    with s.cache:
        loss_of(s.model, s.x).backward()
        ag.attribute(s.cache, s.optimizer)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    s = Setup(steps=1)
    call, error, message = BAD[case]
    weights = copy.deepcopy(s.model.state_dict())
    with pytest.raises(error, match=message):
        call(s)
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), s.model.state_dict().values(), strict=True))


def test_batch_norm_in_training_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="'1' is a BatchNorm1d in training mode"), ag.LayerCache(model):
        pass
    with ag.LayerCache(model.eval()):
        pass


def test_two_batch_sizes_in_one_recording_are_refused():
    s = Setup()
    s.cache.clear()
    with pytest.raises(ValueError, match="batches of 5 and 3 samples"), s.cache:
        loss_of(s.model, s.x)
        loss_of(s.model, s.x[:3])


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    cache = ag.LayerCache(model, lambda: model(torch.tensor([[1]])).sum())
    with cache:
        model(torch.tensor([[1], [2]])).sum().backward()
    with pytest.raises(ValueError, match=r"'0.weight' has a sparse gradient"):
        ag.attribute(cache, torch.optim.AdamW(model.parameters()))


def test_val_loss_draws_anew_each_time():
    drawn = []

    def val():
        drawn.append(torch.randint(0, VOCABULARY, (2, CONTEXT + 1)))
        return loss_of(s.model, drawn[-1])

    s = Setup(val=val)
    for _ in range(3):
        torch.manual_seed(1)
        ag.attribute(s.cache, s.optimizer)
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 3
