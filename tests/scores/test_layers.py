"""Every kind of layer: scores equal < P , g_i > of both oracles, to rounding in float64."""

import pytest
import torch
from models import IN_FLOAT32, NO_FORWARD_MODE, ONE, RANDOM, SEQUENCES, VOCABULARY, Checkpointed, D, Embed, Fn, N, around, problem
from oracles import close, derivative_of_losses, gradients_loss_by_loss, gradients_one_by_one, inner
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def check(case, name=""):
    case.warm().record()
    scores = case.attribute()
    P = case.direction()
    assert not scores.requires_grad and scores.dtype == torch.float64
    tolerance = 1e-6 if name in IN_FLOAT32 else 1e-10
    close(scores, torch.stack([inner(P, g) for g in gradients_one_by_one(case)]), tolerance)
    if name not in NO_FORWARD_MODE:
        close(scores, derivative_of_losses(case, P), tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ONE)
def test_layer(name, reduction):
    check(problem(*ONE[name], reduction=reduction), name)


@pytest.mark.parametrize("n, T", [(N, 7), (N, N), (1, 3)], ids=["T=7", "T=n", "n=1"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(name, n, T):
    if name == "expanded" and n == 1:
        pytest.skip("its expansion is over n")
    check(problem(*SEQUENCES[name], n=n, T=T, reduction="sum" if T == N else "mean"), name)


@pytest.mark.xfail(
    strict=True, raises=RuntimeError, reason="torch runs backward passes with function modes off: named as not covered"
)
def test_plain_parameter_in_reentrant_checkpoint():
    check(problem(lambda: Checkpointed(True, raw=True), "x"), "checkpoint-reentrant")


def both_ways(self, x):
    """A block that sees samples first, then tokens first: where there are as many of both, its recomputations look alike."""
    x = checkpoint(self.block, torch.tanh(self.first(x)), use_reentrant=True)
    return self.last(checkpoint(self.block, x.transpose(0, 1), use_reentrant=True).transpose(0, 1))


def test_checkpoint_called_both_ways():
    def build():
        return Fn(both_ways, first=nn.Linear(D, D), block=around(nn.LayerNorm(D)), last=nn.Linear(D, 2))

    check(problem(build, "x"), "checkpoint-reentrant")
    with pytest.raises(RuntimeError, match=r"not attributed: block\.0\.weight"):
        check(problem(build, "x", T=N))


SUMS = {
    "plus": lambda x, p: x + p,
    "minus": lambda x, p: x - p,
    "from": lambda x, p: p - x,
    "times three": lambda x, p: torch.add(x, p, alpha=3),
    "through a view": lambda x, p: p.unsqueeze(0) + x,
    "not alone": lambda x, p: x + p.square(),
}


@pytest.mark.parametrize("name", SUMS)
def test_positions_in_a_sum(name):
    def build():
        body = lambda s, x: s.last(torch.tanh(SUMS[name](x, s.positions(torch.arange(x.shape[1])))))  # noqa: E731
        return Fn(body, positions=nn.Embedding(7, D), last=nn.Linear(D, 2))

    check(problem(build, "x"))


# of x [n, T, D], by a module s with weights w [3, D], b [3], one [1], v [D], stack [T, D, 3]
PRODUCTS = {
    "linear": lambda x, s: F.linear(x, s.w, s.b),
    "by keyword": lambda x, s: F.linear(x, bias=s.b, weight=s.w),
    "one bias for all": lambda x, s: F.linear(x, s.w, s.one),
    "bias alone": lambda x, s: F.linear(x, s.w.detach(), s.b),
    "weight alone": lambda x, s: F.linear(x, s.w, s.b.detach()),
    "a vector": lambda x, s: F.linear(x, s.v).unsqueeze(-1),
    "of views": lambda x, s: F.linear(x, s.w.flip(0).contiguous(), s.b[:1].expand(3)),
    "of sections": lambda x, s: torch.cat([F.linear(x, w, b) for w, b in zip(s.w.split(1), s.b.split(1), strict=True)], -1),
    "of generated weights": lambda x, s: F.linear(x, torch.tanh(s.w)),
    "matmul": lambda x, s: x @ s.w.T,
    "mm": lambda x, s: torch.mm(x.flatten(0, 1), s.w.mT).view(*x.shape[:2], 3),
    "tokens first": lambda x, s: (x.transpose(0, 1) @ s.w.T).transpose(0, 1),
    "of features": lambda x, s: x.mT @ s.stack[:, :, 0],
    "of a stack": lambda x, s: (x.transpose(0, 1) @ s.stack).transpose(0, 1),
    "of a vector": lambda x, s: (x @ s.v).unsqueeze(-1),
    "moved rows": lambda x, s: F.linear(x.flatten(0, 1).flip(0), s.w, s.b).flip(0).view(*x.shape[:2], 3),
    "moved rows, one bias": lambda x, s: F.linear(x.flatten(0, 1).flip(0), s.w, s.one).flip(0).view(*x.shape[:2], 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_by_functions(name):
    T = 5

    def build():
        shapes = {"w": (3, D), "b": (3,), "one": (1,), "v": (D,), "stack": (T, D, 3)}
        body = lambda s, x: PRODUCTS[name](torch.tanh(s.first(x)), s)  # noqa: E731
        model = Fn(body, first=nn.Linear(D, D))
        for k, shape in shapes.items():
            model.register_parameter(k, nn.Parameter(torch.randn(shape)))
        return model

    check(problem(build, "x", T=T))


@pytest.mark.parametrize("name", RANDOM)
def test_random_and_stateful_layers(name):
    """The replay of a call draws the numbers, and meets the buffers, that the call met."""
    case = problem(RANDOM[name], "x").warm()
    params = list(case.params.values())  # those with a gradient, which a first val_loss() does not find there
    case.cache.validation.val_loss = lambda: sum(p.sin().sum() for p in params)
    buffers = {k: b.clone() for k, b in case.model.named_buffers()}
    case.record()
    after = {k: b.clone() for k, b in case.model.named_buffers()}
    scores = case.attribute(at="current", rule="sgd")
    assert all(torch.equal(b, after[k]) for k, b in case.model.named_buffers())
    for k, b in case.model.named_buffers():
        b.copy_(buffers[k])
    P = {k: 1e-2 * p.detach().cos() for k, p in case.params.items()}
    close(scores, torch.stack([inner(P, g) for g in gradients_loss_by_loss(case)]))


def test_frequency_scaled_embedding():
    """Counts are of the whole batch, as in the gradient."""
    case = problem(lambda: Embed(nn.Embedding(VOCABULARY, D, scale_grad_by_freq=True)), "ids").warm().record()
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_loss_by_loss(case)]))


@pytest.mark.parametrize("T", [N, 3], ids=["T=n", "T=3"])
def test_a_part_of_the_model_called_on_its_own(T):
    """As in GPT-2's `model.transformer(x)`: what is looked up inside is no batch, whatever its size."""
    body = lambda s, i: s.p(torch.arange(i.shape[1])) + s.e(i)  # noqa: E731
    parts = {"body": Fn(body, e=nn.Embedding(VOCABULARY, D), p=nn.Embedding(9, D)), "head": nn.Linear(D, 3)}
    case = problem(lambda: nn.ModuleDict(parts), "ids", T=T)
    case.model.forward = lambda i: parts["head"](torch.tanh(parts["body"](i)))
    case.optimizer.zero_grad()
    with case.cache:
        case.shares(case.model.forward(*case.inputs)).sum().backward()
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]))
