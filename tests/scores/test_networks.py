"""Networks drawn at random: blocks in any order, any sizes, the sizes of different things often the same."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import Fn, Leaf, Slope, normal
from oracles import Problem, close, derivative_of_losses, gradients_one_by_one, inner
from torch import nn
from torch.nn import functional as F

D = 4  # also a frequent number of samples, tokens and heads


def mixer(T):
    return Fn(lambda s, x: s.a(x.mT).mT, a=nn.Linear(T, T))


BLOCKS = {
    "linear": lambda T: nn.Linear(D, D),
    "norm": lambda T: nn.LayerNorm(D),
    "rms": lambda T: nn.RMSNorm(D),
    "attention": lambda T: Fn(lambda s, x: s.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(D, 2, batch_first=True)),
    "lstm": lambda T: Fn(lambda s, x: s.a(x)[0] + s.a(x)[1][0].mean(0)[:, None], a=nn.LSTM(D, D, 2, batch_first=True)),
    "convolution": lambda T: Fn(lambda s, x: s.a(x.transpose(1, 2)).transpose(-1, -2), a=nn.Conv1d(D, D, 3, padding=1, groups=2)),
    "mixer": mixer,
    "scale": lambda T: Leaf(lambda s, x: x * s.g, g=normal(D)),
    "positions": lambda T: Fn(lambda s, x: x + s.p(torch.arange(x.shape[1])), p=nn.Embedding(T, D)),
    "table": lambda T: Fn(lambda s, x: s.p[: x.shape[1]] + x, p=normal(T, D)),
    "layer-of-positions": lambda T: Fn(lambda s, x: x + s.p(x), p=Leaf(lambda s, x: s.p[: x.shape[1]] * 2, p=normal(T, D))),
    "heads": lambda T: Fn(lambda s, x: torch.einsum("btd,hde->bhte", x, s.w).sum(1), w=normal(D, D, D)),
    "heads-first": lambda T: Fn(lambda s, x: torch.einsum("btd,hde->hbte", x, s.w).mean(0), w=normal(D, D, D)),
    "matmul-heads": lambda T: Fn(lambda s, x: (x.unsqueeze(1) @ s.w).mean(dim=1), w=normal(D, D, D)),
    "tensordot": lambda T: Fn(lambda s, x: torch.tensordot(x, s.w, dims=([2], [1])).sum(2), w=normal(D, D, D)),
    "time-major": lambda T: Fn(
        lambda s, x: s.a(torch.tanh(x.transpose(0, 1)) * s.g).permute(1, 0, 2), a=nn.Linear(D, D), g=normal(D)
    ),
    "token-gate": lambda T: Fn(
        lambda s, x: (x.movedim(1, 0) * (x.movedim(1, 0) @ s.w).sigmoid()[..., None]).movedim(0, 1), w=normal(D)
    ),
    "flat": lambda T: Fn(lambda s, x: s.a(x.reshape(-1, D)).view(*x.shape), a=nn.Linear(D, D)),
    "class-token": lambda T: Fn(lambda s, x: torch.cat([s.c.expand(len(x), 1, D), x], 1)[:, :-1], c=normal(1, 1, D)),
    "stacked": lambda T: Fn(lambda s, x: torch.stack([x, x * s.g, s.p.expand_as(x)]).sum(0), g=normal(D), p=normal(D)),
    "in-place": lambda T: Fn(written, a=nn.Linear(D, D), p=normal(D)),
    "normalized": lambda T: Fn(lambda s, x: F.normalize(x, dim=-1) * s.g + x / x.norm(2, -1, keepdim=True), g=normal(1)),
    "maximum": lambda T: Fn(lambda s, x: torch.max(x, s.p) + x.max(1, keepdim=True)[0] * s.p, p=normal(D)),
    "function": lambda T: Leaf(lambda s, x: Slope.apply(x, s.w), w=normal(D)),
    "tied": lambda T: Fn(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight.t(), s.a.bias), a=nn.Linear(D, D)),
    "chunks": lambda T: Fn(lambda s, x: torch.mul(*s.a(x).chunk(2, -1)), a=nn.Linear(D, 2 * D)),
    "unpacked": lambda T: Fn(unpacked, a=nn.Linear(D, 3 * D), b=normal(2, T, T)),
    "queries": lambda T: Fn(lambda s, x: F.scaled_dot_product_attention(s.q.expand(len(x), T, D), x, x), q=normal(T, D)),
}


def written(s, x):
    y = s.a(x)
    y.tanh_()
    y = y * 1
    y[:, 0] = s.p
    y[..., 0] += x[..., 1]
    return y


def unpacked(s, x):
    n, T, d = x.shape
    q, k, v = s.a(x).view(n, T, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
    return ((q @ k.mT + s.b).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Network(nn.Module):
    def __init__(self, blocks, T, residual, again):
        super().__init__()
        self.blocks, self.residual = nn.ModuleList(BLOCKS[b](T) for b in blocks), residual
        if again:
            self.blocks.append(self.blocks[0])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(torch.tanh(x)) if self.residual else block(x)
        return x


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4),
    n=st.integers(1, 4),
    T=st.integers(1, 4),
    residual=st.booleans(),
    again=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_networks(blocks, n, T, residual, again, reduction):
    torch.manual_seed(len(blocks) + 10 * n + T)
    model = Network(blocks, T, residual, again).double()
    x, val = (torch.randn(k, T, D, dtype=torch.float64) for k in (n, 3))
    case = Problem(model, (x,), (val,), reduction=reduction).warm(1).record()
    P = case.direction()
    scores = case.attribute()
    want = torch.stack([inner(P, g) for g in gradients_one_by_one(case)])
    assume(want.norm() > 1e-9)  # attention to one token alone has no use for a query
    close(scores, want)
    if "function" not in blocks:
        close(scores, derivative_of_losses(case, P))
