"""Rows of several samples: where a tensor has its tokens is followed, and never told by a size, which others may have too."""

import pytest
import torch
from models import D, Fn
from oracles import Problem, close, inner
from torch import nn
from torch.utils.checkpoint import checkpoint

import adam_ghost as ag
from adam_ghost.run.lookahead import ContractingRecording

ROWS = 2
OFFSETS = torch.tensor([0, 2, 3, 7, 10])  # four samples in two rows of T = 5 tokens
T, SAMPLES = 5, 4
SEEN = torch.bucketize(torch.arange(ROWS * T), OFFSETS[1:], right=True).view(ROWS, T)


def heads(h, count):
    """``[rows, count, T, d]``"""
    return h.unflatten(-1, (count, -1)).transpose(1, 2)


# what a layer is called on, of h [rows, T, width] with as many heads or features as there are tokens, or another number
WAYS = {
    "heads": (lambda s, h, k: s.l(heads(h, k)).transpose(1, 2).flatten(2), lambda k: nn.Linear(2, 2), 2),
    "heads-norm": (lambda s, h, k: s.l(heads(h, k)).transpose(1, 2).flatten(2), lambda k: nn.LayerNorm(2), 2),
    "heads-of-rows": (
        lambda s, h, k: s.l(heads(h, k).flatten(0, 1)).unflatten(0, (ROWS, k)).transpose(1, 2).flatten(2),
        lambda k: nn.Linear(2, 2),
        2,
    ),
    "channels": (lambda s, h, k: s.l(h.mT).mT, lambda k: nn.Conv1d(k, k, 1), 1),
    "channels-scaled": (lambda s, h, k: (h.mT * s.l.weight[:, None]).mT, lambda k: nn.LayerNorm(k), 1),
    "channels-moved": (lambda s, h, k: s.l(h.mT[:, torch.arange(k).flip(0)].mT), lambda k: nn.Linear(k, k), 1),
    "channels-joined": (lambda s, h, k: s.l(torch.cat([h.mT, h.mT[:, :1]], 1).mT), lambda k: nn.Linear(k + 1, k), 1),
    "heads-moved": (
        lambda s, h, k: s.l(heads(h, k)[:, torch.arange(k).flip(0)]).transpose(1, 2).flatten(2),
        lambda k: nn.Linear(2, 2),
        2,
    ),
    "time-first": (lambda s, h, k: s.l(h.transpose(0, 1)).transpose(0, 1), lambda k: nn.Linear(k, k), 1),
    "time-first-in-line": (
        lambda s, h, k: s.l(h.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, ROWS)).transpose(0, 1),
        lambda k: nn.Linear(k, k),
        1,
    ),
    "in-line": (lambda s, h, k: s.l(h.flatten(0, 1)).view(h.shape), lambda k: nn.Linear(k, k), 1),
    "sorted-in-rows": (
        lambda s, h, k: s.l(h.gather(1, h[..., 0].argsort(1)[..., None].expand_as(h))).gather(
            1, h[..., 0].argsort(1).argsort(1)[..., None].expand_as(h)
        ),
        lambda k: nn.Linear(k, k),
        1,
    ),
    "rolled": (lambda s, h, k: s.l(h.roll(1, 1)).roll(-1, 1), lambda k: nn.Linear(k, k), 1),
    "split-heads": (lambda s, h, k: s.l(h.unflatten(-1, (k, -1))).flatten(2), lambda k: nn.Linear(2, 2), 2),
    "one-number": (lambda s, h, k: h * s.l(h).squeeze(-1).tanh()[..., None], lambda k: nn.Linear(k, 1), 1),
    "checkpointed": (
        lambda s, h, k: checkpoint(lambda x: s.l(heads(x, k)).transpose(1, 2).flatten(2), h, use_reentrant=False),
        lambda k: nn.Linear(2, 2),
        2,
    ),
    "attention": (
        lambda s, h, k: s.l((heads(h, k) @ heads(h, k).mT + s.mask).softmax(-1) @ heads(h, k)).transpose(1, 2).flatten(2),
        lambda k: nn.Linear(2, 2),
        2,
    ),
    "fused-attention": (
        lambda s, h, k: (
            s.l(nn.functional.scaled_dot_product_attention(*[heads(h, k)] * 3, attn_mask=s.mask)).transpose(1, 2).flatten(2)
        ),
        lambda k: nn.Linear(2, 2),
        2,
    ),
}


def problem_of(way, count):
    torch.manual_seed(0)
    forward, layer, width = WAYS[way]
    width *= count
    model = Fn(
        lambda s, x: s.b(torch.tanh(forward(s, torch.tanh(s.a(x)), count))),
        a=nn.Linear(D, width),
        l=layer(count),
        b=nn.Linear(width, 2),
    ).double()
    mask = (SEEN[:, :, None] == SEEN[:, None])[:, None]
    model.register_buffer("mask", torch.zeros(mask.shape).double().masked_fill(~mask, float("-inf")))

    def losses(out):
        per_token = (out - 0.3).square().sum(-1).flatten()
        return torch.stack([part.mean() + part.sum().sin() for part in per_token.split(OFFSETS.diff().tolist())])

    class Packed(Problem):
        def shares(self, out, n=None):
            return losses(out)

    x, val = torch.randn(2, ROWS, T, D, dtype=torch.float64)
    return Packed(model, (x,), (val,), losses=losses)


def wanted(case, P):
    shares = case.shares(case.model(*case.inputs))
    found = [torch.autograd.grad(x, list(case.params.values()), retain_graph=True) for x in shares]
    return torch.stack([inner(P, dict(zip(case.params, g, strict=True))) for g in found])


both = pytest.mark.parametrize("count", [T, 3], ids=["as many as tokens", "others"])
# a convolution's tokens are not followed: the model's own derivative serves
mark = pytest.mark.filterwarnings("ignore:adam_ghost. lost by the layer calls. l.weight, l.bias")


@mark
@both
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_where_they_went(way, count):
    case = problem_of(way, count).warm()
    case.optimizer.zero_grad()
    with case.cache.packed(OFFSETS):
        case.backward()
    P = case.direction()
    close(case.attribute(), wanted(case, P))


@mark
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_where_they_went_as_gradients_form(way, monkeypatch):
    case, taken, plain = problem_of(way, T).warm(11), [], ContractingRecording.__init__

    def take(self, P, *args, **options):
        taken.append({name: x[0].clone() for name, x in P.items()})
        plain(self, P, *args, **options)

    monkeypatch.setattr(ContractingRecording, "__init__", take)
    case.optimizer.zero_grad()
    with ag.InRun(case.model, case.optimizer, case.val_loss, "lookahead", strict=True) as run:
        run.batch(range(SAMPLES), OFFSETS)
        case.backward()
        case.optimizer.step()
        run.flush()
    close(torch.from_numpy(run.scores().total), wanted(problem_of(way, T).warm(11), taken[0]))


@pytest.mark.parametrize("fallback", [False, True])
def test_tokens_that_are_not_followed_are_named(fallback):
    """Also where the model's output may have its tokens along either of two dimensions."""
    case = problem_of("channels", T)
    case.cache.fallback = fallback
    inner_forward, head = case.model.run, nn.Linear(2, T).double()
    case.model.head = head
    case.model.run = lambda s, x: head(inner_forward(s, x)).mT
    case.losses, plain = lambda out: plain(out.mT), case.losses
    case.optimizer = torch.optim.AdamW(case.model.parameters())
    case.optimizer.zero_grad()
    with case.cache.packed(OFFSETS):
        case.losses(case.model(*case.inputs)).sum().backward()
    with pytest.raises(RuntimeError, match=r"not attributed: .*l.weight, l.bias, b.weight, b.bias"):
        case.attribute()


@pytest.mark.parametrize("way", ["heads", "heads-of-rows", "time-first", "channels-scaled", "split-heads"])
def test_tokens_are_where_they_went_on_a_learned_route(way):
    case = problem_of(way, T)
    forward, model = WAYS[way][0], case.model
    middle = Fn(lambda s, x: forward(s, x, T), l=model.l)
    middle.register_buffer("mask", model.mask)
    case.model = nn.Sequential(nn.Sequential(model.a, nn.Tanh()), middle, nn.Sequential(nn.Tanh(), model.b))
    case.optimizer = torch.optim.AdamW(case.model.parameters())
    case.cache = ag.LayerCache(case.model, case.val_loss, strict=True, fallback=False)
    case.warm()
    for step in range(4):
        case.inputs = (torch.randn(ROWS, T, D, generator=torch.Generator().manual_seed(step)).double(),)
        case.optimizer.zero_grad()
        with case.cache.packed(OFFSETS):
            case.backward()
        P = case.direction()
        close(case.attribute(), wanted(case, P))
    assert any(case.cache._recorder._routes.values())
