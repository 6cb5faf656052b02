"""Targets, tokens, places and rules of ``attribute``, and the pairwise products of ``gram``."""

import pytest
import torch
from models import SEQUENCES, VOCABULARY, D, Embed, Fn, N, normal, problem
from oracles import close, gradients, gradients_one_by_one, inner
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.step import step


def prepared(name="nanogpt", **options):
    return problem(*SEQUENCES[name], **options).warm().record()


def flat(grads):
    return torch.stack([torch.cat([torch.zeros(0)] + [x.flatten() for x in g.values() if x is not None]) for g in grads])


@pytest.mark.parametrize("at", ["midpoint", "gauss", "lookahead", "current"])
def test_targets(at):
    case = prepared()
    targets = [lambda k=k: case.losses(case.model(*case.val_inputs))[k] for k in range(3)]
    alone = []
    for target in targets:
        case.cache.validation.val_loss = target
        alone.append(case.attribute(at=at))
    case.cache.validation.val_loss = lambda: torch.stack([t() for t in targets])
    scores = case.attribute(at=at)
    assert scores.shape == (N, 3)
    close(scores, torch.stack(alone, 1), 1e-12)
    case.cache.validation.val_loss = lambda: targets[0]()[None]
    assert case.attribute(at=at).shape == (N, 1)


@pytest.mark.parametrize("name", ["nanogpt", "layer-scale", "hf-conv1d", "time-major", "tokens-apart", "einsum"])
@pytest.mark.parametrize("T", [N, 3], ids=["T=n", "T=3"])
def test_tokens(name, T):
    """Where tokens never meet, a token's score is that of its own loss."""
    more = {
        "tokens-apart": (lambda: Fn(apart, a=nn.Linear(D, 4), b=nn.Linear(4, 2)), "x"),
        "einsum": (lambda: Fn(lambda s, x: torch.einsum("btd,de->bte", s.a(x), s.w), a=nn.Linear(D, D), w=normal(D, 2)), "x"),
    }
    case = problem(*(SEQUENCES | more)[name], T=T)
    of_tokens = lambda out: (out - 0.3).square().mean(-1) + out[..., 0].sin()  # noqa: E731
    case.losses = lambda out: of_tokens(out).sum(1)
    case.warm().record()
    P = case.direction()
    scores = case.attribute(per_token=True)
    found = [inner(P, gradients(x, case.params, retain_graph=True)) for x in of_tokens(case.model(*case.inputs)).flatten() / case.n]
    close(scores, torch.stack(found).view(N, T))
    close(scores.sum(1), case.attribute(), 1e-12)
    case.cache.validation.val_loss = lambda: case.losses(case.model(*case.val_inputs))
    assert case.attribute(per_token=True).shape == (N, T, 4)


def test_tokens_of_packed_rows():
    """Rows stay rows; a sample's score is the sum of its tokens'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randint(7, (2, 6)), torch.randint(3, (12,))
    optimizer, offsets = torch.optim.SGD(model.parameters(), lr=0.1), torch.tensor([0, 4, 9, 12])
    cache = ag.LayerCache(model, lambda: model(x[:1]).square().mean())
    with cache.packed(offsets=offsets):
        nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
    by_token = ag.attribute(cache, optimizer, per_token=True)
    assert by_token.shape == (2, 6)
    of_samples = torch.stack([part.sum() for part in by_token.flatten().split(offsets.diff().tolist())])
    close(of_samples, ag.attribute(cache, optimizer), 1e-6)
    model.zero_grad()
    with cache:
        nn.functional.cross_entropy(model(x).flatten(0, 1), y).backward()
    close(by_token, ag.attribute(cache, optimizer, per_token=True), 1e-6)


def apart(self, x):
    n, T, d = x.shape
    return self.b(torch.tanh(self.a(x.reshape(-1, d)))).view(n, T, -1)


@pytest.mark.parametrize(
    "model, shape",
    [(lambda: nn.Linear(D, 2), (D,)), (lambda: Embed(nn.EmbeddingBag(VOCABULARY, D)), "ids"), (lambda: nn.Conv1d(2, 2, 3), (2, 7))],
    ids=["rows", "bag", "convolution"],
)
def test_no_tokens(model, shape):
    with pytest.raises(ValueError, match="per_token=True needs"):
        problem(model, shape).record().attribute(per_token=True)


PLACES = [("sgd", "current"), ("frozen", "current"), ("frozen", "lookahead"), ("tangent", "midpoint"), ("secant", "gauss")]


@pytest.mark.parametrize("rule, at", PLACES)
def test_rules_and_places(rule, at):
    case = prepared()
    state = ag.AdamState.of(case.optimizer)
    held = {k: p.detach().clone() for k, p in case.params.items()}
    vals = []
    for way in {"gauss": (0.5 - 12**-0.5, 0.5 + 12**-0.5)}.get(at, (0.5,)):
        for p in case.params.values():
            empty, full = state.empty_weights(p), state.weights(p, p.grad)
            p.data = {"current": p, "lookahead": empty}.get(at, empty + way * (full - empty)).detach()
        vals.append(gradients(case.val_loss(), case.params))
        for k, p in case.params.items():
            p.data = held[k]
    val = {k: sum(v[k] for v in vals) / len(vals) for k in held}
    P = {k: 1e-2 * val[k] * state.scaling(p, p.grad, rule) for k, p in case.params.items()}
    close(case.attribute(rule=rule, at=at), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]))


GRAM = {
    "tied": SEQUENCES["nanogpt"],
    "tied-function": SEQUENCES["tied-linear"],
    "twice": SEQUENCES["called-twice"],
    "attention": SEQUENCES["attention"],
    "einsum": SEQUENCES["raw-einsum"],
    "scalar": (lambda: Fn(lambda s, x: torch.sigmoid(s.s) * s.a(x), a=nn.Linear(D, D), s=normal()), "x"),
}


def diagonal(case):
    """``lr * S`` by the optimizer's own steps."""
    empty, full = case.after_step(0.0), case.after_step(1.0)
    return {k: torch.where(p.grad == 0, 0.0, (empty[k] - full[k]) / p.grad) for k, p in case.params.items()}


@pytest.mark.parametrize("preconditioner", ["exact", None])
@pytest.mark.parametrize("name", GRAM)
def test_gram(name, preconditioner):
    case = problem(*GRAM[name]).warm().record()
    D_ = diagonal(case) if preconditioner else {k: torch.ones_like(p) for k, p in case.params.items()}
    found = gradients_one_by_one(case)
    want = flat([{k: D_[k] * g for k, g in grads.items()} for grads in found]) @ flat(found).T
    got = ag.gram(case.cache, case.optimizer, preconditioner=preconditioner)
    close(got, want)
    assert torch.equal(got, ag.gram(case.cache, case.optimizer, preconditioner=preconditioner))


def test_gram_in_blocks(monkeypatch):
    case = prepared()
    whole = ag.gram(case.cache, case.optimizer)
    monkeypatch.setattr(step, "_BLOCK_BYTES", 300)
    close(ag.gram(case.cache, case.optimizer), whole, 1e-13)


@pytest.mark.parametrize("name", ["linears", "hf-conv1d", "called-twice", "tied"])
def test_factored_gram(name):
    linears = (lambda: nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 3)), "x")
    model, shape = {"linears": linears, "tied": SEQUENCES["nanogpt"]}.get(name) or SEQUENCES[name]
    case = problem(model, shape).warm().record()
    D_ = diagonal(case)
    worst = 0.0
    for k, x in D_.items():
        if x.ndim == 2 and not (name == "tied" and ("tokens" in k or "positions" in k)):
            U, S, V = torch.linalg.svd(x)
            D_[k] = S[0] * torch.outer(U[:, 0], V[0])
            worst = max(worst, float(S[1] / S[0]))
    found = gradients_one_by_one(case)
    want = flat([{k: D_[k] * g for k, g in grads.items()} for grads in found]) @ flat(found).T
    # eight power iterations, each of two products
    close(ag.gram(case.cache, case.optimizer, preconditioner="factored"), want, 1e-9 + 10 * worst**16)


def test_factored_gram_without_calls():
    """A parameter with a gradient of zeros that no call explains."""
    model = lambda: Fn(lambda s, x: s.a(x), a=nn.Linear(D, 2), b=nn.Linear(D, D))  # noqa: E731
    case = problem(model, "x")
    for p in case.model.parameters():
        p.grad = torch.zeros_like(p)
    with case.cache:
        case.shares(case.model(*case.inputs)).sum().backward()
    assert ag.gram(case.cache, case.optimizer, preconditioner="factored").shape == (N, N)


def test_ragged_sequences():
    """Padded rows, a loss over what is real."""
    case = problem(*SEQUENCES["nanogpt"], T=6)
    lengths = torch.tensor([6, 1, 3, 5, 2])
    mask = torch.arange(6) < lengths[:, None]
    real = lambda out, mask: (F.log_softmax(out, -1)[..., 0] * mask).sum(1) / mask.sum(1)  # noqa: E731
    case.losses = lambda out: real(out, mask[: len(out)])
    case.warm().record()
    P = case.direction()
    found = []
    for i, length in enumerate(lengths):
        out = case.model(case.inputs[0][i : i + 1, :length])
        found.append(inner(P, gradients((F.log_softmax(out, -1)[..., 0].mean() / N), case.params)))
    close(case.attribute(), torch.stack(found))


def test_two_calls_of_the_model_with_one_batch():
    """Two views of each sample, as in Siamese training: both count for it."""
    case = problem(*SEQUENCES["nanogpt"]).warm()
    views = case.inputs[0], case.inputs[0].flip(1)
    case.optimizer.zero_grad()
    with case.cache:
        (case.shares(case.model(views[0])) * 2 + case.shares(case.model(views[1]))).sum().backward()
    P = case.direction()
    found = []
    for i in range(N):
        a, b = (case.shares(case.model(x[i : i + 1]), N).sum() for x in views)
        found.append(inner(P, gradients(a * 2 + b, case.params)))
    close(case.attribute(), torch.stack(found))


def test_under_no_grad():
    case = prepared("relative-bias")
    with torch.no_grad():
        scores = case.attribute()
    assert torch.equal(scores, case.attribute())
