"""Custom autograd functions: a false declaration is found out, and the undeclared hide the batch."""

import pytest
import torch
from oracles import Problem, close, gradients_one_by_one, inner
from torch import nn

import adam_ghost as ag


def function(forward, backward):
    class Mine(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return backward(grad)

    return Mine


def record(mine):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(mine.apply(self.a(x)))

    model = Model()
    cache = ag.LayerCache(model, lambda: model(torch.ones(2, 3)).sum(), strict=True)
    with cache:
        model(torch.randn(4, 3)).square().sum().backward()
    return ag.attribute(cache, torch.optim.Adam(model.parameters()))


def test_true_declaration():
    assert record(ag.keeps_samples_apart(function(lambda x: 2 * x, lambda g: 2 * g))).shape == (4,)


@pytest.mark.parametrize(
    "mine",
    [function(lambda x: x - x.mean(0), lambda g: g - g.mean(0)), function(lambda x: 2 * x, lambda g: g - g.mean(0))],
    ids=["forward", "backward"],
)
def test_false_declaration(mine):
    with pytest.raises(RuntimeError, match=r"not attributed: b\.weight"):
        record(mine)
    with pytest.raises(ValueError, match="was declared to keep samples apart"):
        record(ag.keeps_samples_apart(mine))


def test_only_functions():
    with pytest.raises(TypeError, match="subclass of torch"):
        ag.keeps_samples_apart(dict)


class Attending(nn.Module):
    """One long row of each sample's tokens, or a row to each; attention by a function that shows nothing of itself."""

    def __init__(self, attend, unpadded):
        super().__init__()
        self.qkv, self.out, self.attend, self.unpadded = nn.Linear(4, 12), nn.Linear(4, 2), attend, unpadded

    def forward(self, x):
        h = self.qkv(x)
        h = h[torch.ones(x.shape[:2], dtype=torch.bool)][None] if self.unpadded else h  # [1, n T, 12]
        q, k, v = (y.unflatten(-1, (2, 2)).transpose(1, 2) for y in h.chunk(3, -1))
        documents = torch.arange(len(x) if self.unpadded else 1).repeat_interleave(x.shape[1])
        return self.out(self.attend(q, k, v, documents).transpose(1, 2).flatten(2)).view(*x.shape[:2], 2)


def by_flex(q, k, v, documents):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    same = lambda b, h, i, j: documents[i] == documents[j]  # noqa: E731
    mask = create_block_mask(same, None, None, len(documents), len(documents), device="cpu")
    return flex_attention(q, k, v, block_mask=mask)


@pytest.mark.parametrize("unpadded", [False, True], ids=["padded", "unpadded"])
def test_flex_attention_by_documents(unpadded, monkeypatch):
    """It compiles a part of itself, under the eyes of the recorder; undeclared, what is behind it is named."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # it has a backward pass on the CPU, and denies it
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, 5, 4)
    case = Problem(Attending(by_flex, unpadded), (x,), (v,), cache_options={"fallback": False}).warm().record()
    with pytest.raises(RuntimeError, match=r"not attributed: out\.weight"):
        case.attribute()
    case.model.attend = ag.keeps_samples_apart(by_flex)
    case.record()
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]), 1e-4)


def test_a_function_falsely_declared():
    mixing = ag.keeps_samples_apart(lambda q, k, v, documents: v - v.mean(0))
    case = Problem(Attending(mixing, False), (torch.randn(3, 5, 4),), (torch.randn(3, 5, 4),))
    with pytest.raises(ValueError, match="was declared to keep samples apart"):
        case.record()
