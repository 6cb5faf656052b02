"""An audit notices gradients that are not their samples': what the exact game, played with the same gradients, cannot see."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

N = 6


class Shuffled(torch.autograd.Function):
    """Rows in another order, as an expert's dispatch makes them."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x[order]

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad).index_copy_(0, ctx.order, grad), None


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b, self.drop = nn.Linear(5, 8), nn.Linear(8, 8), nn.Dropout(0.5 if kind == "dropout" else 0.0)
        self.out = nn.Linear(8, 3)

    def forward(self, x, prototypes=None):
        h = torch.tanh(self.a(x))
        if self.kind == "shuffled":
            order = torch.arange(len(x)).roll(1)
            h = Shuffled.apply(torch.tanh(self.b(Shuffled.apply(h, order))), order.argsort())
        elif self.kind == "centred":
            h = torch.tanh(self.b(Centred.apply(h)))
        else:
            h = self.drop(torch.tanh(self.b(h)))
        if prototypes is not None:
            return h @ self.b(prototypes).T
        return {"loss": self.out(h).square().mean()} if self.kind == "loss inside" else self.out(h)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0)


def audited(kind, schedule="midpoint", clip=None, tamper=False, **options):
    torch.manual_seed(0)
    model = Net(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g)

    shared = (torch.randn(N, 8, generator=g),) if kind == "prototypes" else ()  # as many as samples

    def loss(ids):
        out = model(x[ids], *shared)
        return out["loss"] if isinstance(out, dict) else F.cross_entropy(out, y[ids])

    options = {"audit_every": 2, "audit_permutations": 1} | options
    with ag.InRun(model, optimizer, lambda: loss(slice(30, 40)), schedule, **options) as run:
        for step in range(14):
            ids = range(step, step + N)
            run.batch(ids)
            loss(list(ids)).backward()
            if tamper:
                call = next(c for c in run._schedule.pending()[0].recording.calls if c.name == "b")
                call.grad_output = {0: call.grad_output[0].roll(1, 0)}
                call.input.data.copy_(call.input.roll(1, 0))
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return [s.audit for s in run.steps if s.audit]


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_right_gradients_are_their_samples(kind, schedule):
    found = audited(kind, schedule, clip=0.05, strict=True)
    assert len(found) == 7
    assert all(a.alone is not None and a.alone < 1e-4 for a in found)


def test_gradients_that_are_another_samples():
    """Whatever goes wrong with the batch on its way: here one layer's rows are recorded for the sample before."""
    with pytest.warns(UserWarning, match=r"adam_ghost: step 2: the gradients of samples computed alone differ .* by"):
        found = audited("plain", tamper=True)
    assert all(a.alone > 0.05 for a in found)
    assert all(a.r > 0.9 for a in found)


@pytest.mark.parametrize("kind", ["shuffled", "centred"])
def test_code_that_hides_what_it_does_with_the_batch(kind):
    with pytest.warns(UserWarning, match="computed alone differ|not attributed"):
        audited(kind)


def test_a_second_argument_that_is_no_batch():
    """As long as the batch, it is taken for samples, whose exact game it plays well."""
    with pytest.warns(UserWarning, match=r"step 2: the gradients of samples computed alone differ .* a second argument"):
        found = audited("prototypes")
    assert all(a.alone > 0.05 for a in found)


def test_where_it_cannot_be_told():
    assert [a.alone for a in audited("loss inside")] == [None] * 7
