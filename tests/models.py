"""Models of every kind, small, and the step of Adam that each is about to take."""

import pytest
import torch
from oracles import Problem
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import adam_ghost as ag

N, D, VOCABULARY = 5, 6, 11


class Fn(nn.Module):
    """A model of any modules and a forward that uses them: what a user would write as a class of his own."""

    def __init__(self, forward, **members):
        super().__init__()
        self.run = forward
        for name, member in members.items():
            setattr(self, name, nn.Parameter(member) if isinstance(member, torch.Tensor) else member)

    def forward(self, *args):
        return self.run(self, *args)


class Leaf(Fn):
    """The same, used inside another model: a custom layer."""


def normal(*shape):
    return 0.5 * torch.randn(shape)


def around(layer, d_in=D):
    """``layer`` between linear layers, so that its gradient comes from and leads to others."""
    return nn.Sequential(nn.Linear(d_in, D), nn.Tanh(), layer)


def frozen(layer, *names):
    for name in names:
        getattr(layer, name).requires_grad_(False)
    return layer


def hf(module, name, *args):
    transformers = pytest.importorskip("transformers")
    del transformers
    return getattr(__import__(module, fromlist=[name]), name)(*args)


class Embed(nn.Module):
    """Indices to embeddings to a few numbers."""

    def __init__(self, embedding, then=None):
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(D, 3)
        self.then = then or nn.Identity()

    def forward(self, i):
        return self.head(self.then(self.embedding(i)))


class NanoGPT(nn.Module):
    """Token and position embeddings, the latter looked up without a batch dimension; the head tied to the tokens."""

    def __init__(self, how):
        super().__init__()
        self.tokens, self.positions, self.how = nn.Embedding(VOCABULARY, D), nn.Embedding(9, D), how
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.mix = nn.Linear(D, D)

    def forward(self, i):
        T = i.shape[1]
        x = self.tokens(i)
        positions = torch.arange(T)
        if self.how == "unsqueeze":
            p = self.positions(positions.unsqueeze(0))
        elif self.how == "none":
            p = self.positions(positions[None])
        elif self.how == "expand":
            p = self.positions(positions.expand(len(i), T))
        elif self.how == "after":
            p = self.positions(positions).unsqueeze(0)
        else:
            p = self.positions(positions)
        x = p + x if self.how == "left" else x + p
        return self.head(self.norm(x + torch.tanh(self.mix(x))))


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, D, 2, 2)
        self.cls, self.positions = nn.Parameter(normal(1, 1, D)), nn.Parameter(normal(1, 5, D))
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(normal(D)), nn.Linear(D, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.scale * self.attention(x, x, x, need_weights=False)[0]
        return self.head(x[:, 0])


class RelativeBias(nn.Module):
    """T5's attention: a bias per head and distance, added to the scores."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias, self.out = nn.Linear(D, 3 * D), nn.Embedding(17, 2), nn.Linear(D, D)

    def forward(self, x):
        n, T, _ = x.shape
        q, k, v = (y.view(n, T, 2, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        distance = torch.arange(T)[:, None] - torch.arange(T)[None, :] + 8
        scores = q @ k.transpose(-1, -2) + self.bias(distance).permute(2, 0, 1).unsqueeze(0)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, T, -1))


class Queries(nn.Module):
    """DETR's decoder: learned queries attend to the samples."""

    def __init__(self):
        super().__init__()
        self.queries, self.attention = nn.Embedding(N, D), nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 2)

    def forward(self, x):
        q = self.queries.weight.unsqueeze(0).repeat(x.shape[0], 1, 1)
        return self.head(self.norm(q + self.attention(q, x, x)[0]))


@ag.keeps_samples_apart
class Slope(torch.autograd.Function):
    """A product with a backward of its own and no forward mode."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w.exp()

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w.exp(), (grad * x * w.exp()).flatten(0, -2).sum(0)


class TimeMajor(nn.Module):
    """Works on [T, n, d] inside."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.scale, self.last = nn.Linear(D, D), nn.LayerNorm(D), nn.Parameter(normal(D)), nn.Linear(D, 2)

    def forward(self, x):
        x = self.first(x.transpose(0, 1))
        return self.last(self.norm(torch.tanh(x) * self.scale)).transpose(0, 1)


class TimeMajorCheckpoint(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), around(nn.LayerNorm(D)), nn.Linear(D, 2)
        self.reentrant = reentrant

    def forward(self, x):
        x = torch.tanh(self.first(x.transpose(0, 1)))
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant)).transpose(0, 1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant, raw=False):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(D, D), around(nn.LayerNorm(D)), nn.Linear(D, 2)
        self.scale, self.reentrant = Leaf(lambda s, x: x * s.g, g=normal(D)), reentrant
        self.raw = nn.Parameter(normal(D)) if raw else 1.0

    def inner(self, x):
        return self.scale(self.block(x)) * self.raw

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))


def lstm_forward(self, x):
    out, state = self.rnn(x)
    h = state[0] if isinstance(state, tuple) else state
    return self.head(out) + self.head(h.transpose(0, 1)).sum(1, keepdim=True)


def tokens_flat(self, x):
    n, T, d = x.shape
    y = self.first(x.view(-1, d))
    return self.last(torch.tanh(y).view(n, T, -1)).reshape(n, -1)


def in_place(self, x):
    h = F.linear(self.first(x).sigmoid_(), self.middle).tanh_()
    h = h.clone()
    h += self.shift
    h.sub_(self.scale)
    h[:, 0] = self.start
    h[..., 1] += self.scale[1]
    return self.last(h)


def twice(self, x):
    return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))) + self.layer(x * 2))


# name: (model, input), where the input is the shape of a sample, "ids" for T indices
ONE = {
    "linear-2d": (lambda: around(nn.Linear(D, 4)), (D,)),
    "linear-4d": (lambda: around(nn.Linear(D, 4)), (2, 3, D)),
    "linear-no-bias": (lambda: around(nn.Linear(D, 4, bias=False)), (D,)),
    "linear-frozen-bias": (lambda: around(frozen(nn.Linear(D, 4), "bias")), (D,)),
    "linear-frozen-weight": (lambda: around(frozen(nn.Linear(D, 4), "weight")), (D,)),
    "linear-alone": (lambda: nn.Linear(D, 4), (D,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=2, dilation=2)), (2, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 4, 1, groups=4)), (2, 7, 6)),
    "conv2d-circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 5)),
    "conv2d-reflect": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 3, 4, 3)),
    "conv-transpose1d": (lambda: nn.ConvTranspose1d(2, 4, 3, stride=2, groups=2), (2, 4)),
    "conv-transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, dilation=2), (2, 4, 3)),
    "conv-transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 2)),
    "groupnorm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)), (2, 6)),
    "instancenorm": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Conv1d(4, 2, 1)), (2, 6)),
    "batchnorm-eval": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)).eval(), (2, 6)),
    "bilinear": (lambda: Fn(lambda s, x: s.b(s.a(x), torch.tanh(x)), a=nn.Linear(D, 4), b=nn.Bilinear(4, D, 3)), (D,)),
    "bilinear-query": (
        lambda: Fn(lambda s, x: s.b(x, s.q.expand(len(x), -1)), b=nn.Bilinear(D, 4, 3), q=normal(4)),
        (D,),
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(D, 4), nn.PReLU(4), nn.Linear(4, 2)), (D,)),
    "prelu-function": (lambda: Fn(lambda s, x: F.prelu(s.a(x), s.p), a=nn.Linear(D, 4), p=normal(1)), (D,)),
    "vit": (ViT, (2, 4, 4)),
    "einsum-heads": (
        lambda: Fn(lambda s, x: torch.einsum("bd,hde->bhe", s.a(x), s.w).sum(2), a=nn.Linear(D, D), w=normal(N, D, 3)),
        (D,),
    ),
    "einsum-reduce": (
        lambda: Fn(lambda s, x: torch.einsum("bhd,hde->be", s.a(x), s.w), a=nn.Linear(D, D), w=normal(3, D, 2)),
        (3, D),
    ),
    "tensordot": (
        lambda: Fn(lambda s, x: torch.tensordot(s.a(x), s.w, 1).sum(-1), a=nn.Linear(D, D), w=normal(D, N, 3)),
        (D,),
    ),
    "matmul-vector": (lambda: Fn(lambda s, x: (torch.tanh(s.a(x)) @ s.w)[:, None], a=nn.Linear(D, D), w=normal(D)), (D,)),
    "matmul-left": (lambda: Fn(lambda s, x: s.w @ s.a(x), a=nn.Linear(D, D), w=normal(N, 3)), (3, D)),
    "table-lookup": (lambda: Fn(lambda s, x: s.w[(x[:, 0] > 0).long()] * s.a(x), a=nn.Linear(D, D), w=normal(2, D)), (D,)),
    "norm-argument": (
        lambda: Fn(
            lambda s, x: s.b(s.s * x / s.a(x).norm(2, dim=-1, keepdim=True)), a=nn.Linear(D, D), b=nn.Linear(D, 2), s=normal(D)
        ),
        (D,),
    ),
    "transpose-keywords": (
        lambda: Fn(lambda s, x: s.b(s.a(x).transpose(dim0=0, dim1=1)).transpose(0, 1), a=nn.Linear(D, D), b=nn.Linear(D, 2)),
        (N, D),
    ),
    "maximum-of-two": (lambda: Fn(lambda s, x: torch.max(s.a(x), -s.a(x)) * s.s, a=nn.Linear(D, D), s=normal(D)), (D,)),
    "unbind": (lambda: Fn(lambda s, x: s.a(x).transpose(0, 1).unbind()[0] * s.s, a=nn.Linear(D, D), s=normal(D)), (N, D)),
    "scalar-parameter": (lambda: Fn(lambda s, x: torch.sigmoid(s.s) * s.a(x), a=nn.Linear(D, D), s=normal()), (D,)),
    "output-unseen": (lambda: Fn(lambda s, x: s.a(torch.from_numpy(x.numpy())), a=nn.Linear(D, D)), (D,)),
}
SEQUENCES = {
    "linear-3d": (lambda: around(nn.Linear(D, 4)), "x"),
    "layernorm": (lambda: nn.Sequential(around(nn.LayerNorm(D)), nn.Linear(D, 2)), "x"),
    "layernorm-no-bias": (lambda: nn.Sequential(around(nn.LayerNorm(D, bias=False)), nn.Linear(D, 2)), "x"),
    "rmsnorm": (lambda: nn.Sequential(around(nn.RMSNorm(D)), nn.Linear(D, 2)), "x"),
    "hf-conv1d": (lambda: around(hf("transformers.pytorch_utils", "Conv1D", 4, D)), "x"),
    "hf-llama-norm": (lambda: around(hf("transformers.models.llama.modeling_llama", "LlamaRMSNorm", D)), "x"),
    "hf-gemma-norm": (lambda: around(hf("transformers.models.gemma.modeling_gemma", "GemmaRMSNorm", D)), "x"),
    "embedding": (lambda: Embed(nn.Embedding(VOCABULARY, D)), "ids"),
    "embedding-padding": (lambda: Embed(nn.Embedding(VOCABULARY, D, padding_idx=-1)), "ids"),
    "embedding-max-norm": (lambda: Embed(nn.Embedding(VOCABULARY, D, max_norm=1.0)), "ids"),
    "bag-mean": (lambda: Embed(nn.EmbeddingBag(VOCABULARY, D)), "ids"),
    "bag-sum-padding": (lambda: Embed(nn.EmbeddingBag(VOCABULARY, D, mode="sum", padding_idx=2)), "ids"),
    "bag-max": (lambda: Embed(nn.EmbeddingBag(VOCABULARY, D, mode="max")), "ids"),
    "nanogpt": (lambda: NanoGPT("plain"), "ids"),
    "nanogpt-left": (lambda: NanoGPT("left"), "ids"),
    "nanogpt-unsqueeze": (lambda: NanoGPT("unsqueeze"), "ids"),
    "nanogpt-none": (lambda: NanoGPT("none"), "ids"),
    "nanogpt-after": (lambda: NanoGPT("after"), "ids"),
    "nanogpt-expand": (lambda: NanoGPT("expand"), "ids"),
    "relative-bias": (RelativeBias, "x"),
    "queries": (Queries, "x"),
    "attention": (
        lambda: Fn(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(D, 2, batch_first=True)),
        "x",
    ),
    "attention-weights": (
        lambda: Fn(
            lambda s, x: torch.cat([y.flatten(1) for y in s.a(s.b(x), x, x)], 1),
            a=nn.MultiheadAttention(D, 2, batch_first=True),
            b=nn.Linear(D, D),
        ),
        "x",
    ),
    "attention-bias-kv": (
        lambda: Fn(
            lambda s, x: s.a(x, x, x, need_weights=False)[0], a=nn.MultiheadAttention(D, 2, batch_first=True, add_bias_kv=True)
        ),
        "x",
    ),
    "attention-time-major": (
        lambda: Fn(
            lambda s, x: torch.cat(
                [
                    s.a(*[s.b(x).transpose(0, 1)] * 3)[0].transpose(0, 1).flatten(1),
                    s.a(*[s.b(x).transpose(0, 1)] * 3)[1].flatten(1),
                ],
                1,
            ),
            a=nn.MultiheadAttention(D, 2),
            b=nn.Linear(D, D),
        ),
        "x",
    ),
    "transformer-layer": (lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True), "x"),
    "lstm": (lambda: Fn(lstm_forward, rnn=nn.LSTM(D, 4, batch_first=True), head=nn.Linear(4, 2)), "x"),
    "gru-n-layers": (lambda: Fn(lstm_forward, rnn=nn.GRU(D, 4, N, batch_first=True), head=nn.Linear(4, 2)), "x"),
    "rnn-time-major": (lambda: Fn(lambda s, x: s.r(x.transpose(0, 1))[0].transpose(0, 1), r=nn.RNN(D, 4)), "x"),
    "weight-norm": (lambda: around(parametrizations.weight_norm(nn.Linear(D, 4))), "x"),
    "spectral-norm-eval": (lambda: around(parametrizations.spectral_norm(nn.Linear(D, 4))).eval(), "x"),
    "orthogonal": (lambda: around(parametrizations.orthogonal(nn.Linear(D, D), orthogonal_map="cayley")), "x"),
    "layer-scale": (lambda: around(Leaf(lambda s, x: x * s.g, g=normal(D))), "x"),
    "leaf-transposing": (
        lambda: Fn(
            lambda s, x: s.c(s.b(s.a(x))).transpose(0, 1),
            a=nn.Linear(D, D),
            b=Leaf(lambda s, x: x.transpose(0, 1) * s.g.exp(), g=normal(D)),
            c=nn.Linear(D, 2),
        ),
        "x",
    ),
    "raw-matmul": (lambda: Fn(lambda s, x: s.b(torch.tanh(x @ s.w)), w=normal(D, D), b=nn.Linear(D, 2)), "x"),
    "raw-einsum": (
        lambda: Fn(
            lambda s, x: s.b(torch.einsum("btd,de->bte", s.a(x), s.w)), a=nn.Linear(D, D), w=normal(D, D), b=nn.Linear(D, 2)
        ),
        "x",
    ),
    "raw-linear": (lambda: Fn(lambda s, x: F.linear(s.a(x), s.w, s.c), a=nn.Linear(D, D), w=normal(3, D), c=normal(3)), "x"),
    "tied-linear": (lambda: Fn(lambda s, x: F.linear(torch.tanh(s.a(x)), s.a.weight.t()), a=nn.Linear(D, D)), "x"),
    "tied-modules": (lambda: Fn(lambda s, i: s.h(torch.tanh(s.m(s.e(i)))), **tied_ends()), "ids"),
    "time-major": (TimeMajor, "x"),
    "time-vector": (
        lambda: Fn(
            lambda s, x: (s.a(x).transpose(0, 1) @ s.w * s.u[0]).transpose(0, 1), a=nn.Linear(D, D), w=normal(D), u=normal(2)
        ),
        "x",
    ),
    "time-reduced": (
        lambda: Fn(
            lambda s, x: (torch.linalg.vector_norm(s.a(x).transpose(0, 1), dim=-1) * s.u).transpose(0, 1),
            a=nn.Linear(D, D),
            u=normal(),
        ),
        "x",
    ),
    "tokens-flat": (lambda: Fn(tokens_flat, first=nn.Linear(D, 4), last=nn.Linear(4, 2)), "x"),
    "in-place": (
        lambda: Fn(
            in_place,
            first=nn.Linear(D, D),
            last=nn.Linear(D, 2),
            middle=normal(D, D),
            shift=normal(D),
            scale=normal(D),
            start=normal(D),
        ),
        "x",
    ),
    "function": (lambda: around(Leaf(lambda s, x: Slope.apply(x, s.w), w=normal(D))), "x"),
    "checkpoint": (lambda: Checkpointed(False, raw=True), "x"),
    "checkpoint-reentrant": (lambda: Checkpointed(True), "x"),
    "checkpoint-time-major": (lambda: TimeMajorCheckpoint(False), "x"),
    "checkpoint-time-major-reentrant": (lambda: TimeMajorCheckpoint(True), "x"),
    "called-twice": (lambda: Fn(twice, layer=nn.Linear(D, D), last=nn.Linear(D, 2)), "x"),
    "norm-called-twice": (lambda: Fn(twice, layer=nn.LayerNorm(D), last=nn.Linear(D, 2)), "x"),
    "expanded": (
        lambda: Fn(lambda s, x: (s.a(x).mean(1).expand(N, -1, -1) * s.w).sum(0), a=nn.Linear(D, D), w=normal(N, 1, D)),
        "x",
    ),
}
NO_FORWARD_MODE = {
    "bag-mean",
    "bag-sum-padding",
    "bag-max",
    "function",
    "checkpoint-reentrant",
    "embedding-max-norm",
    "weight-norm",
    "output-unseen",
    "checkpoint",
    "checkpoint-time-major",
    "checkpoint-time-major-reentrant",
}


IN_FLOAT32 = {"hf-llama-norm", "hf-gemma-norm"}  # whatever comes in, their variance is taken in float32


def tied_ends():
    ends = {"e": nn.Embedding(VOCABULARY, D), "m": nn.Linear(D, D), "h": nn.Linear(D, VOCABULARY)}
    ends["h"].weight = ends["e"].weight
    return ends


def inputs(shape, n, T, seed):
    generator = torch.Generator().manual_seed(seed)
    if shape == "ids":
        return torch.randint(0, VOCABULARY, (n, T), generator=generator)
    shape = (T, D) if shape == "x" else shape
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def problem(build, shape, n=N, T=7, **options):
    torch.manual_seed(0)
    model = build().double()
    for p in model.parameters():  # nothing at a symmetric start: norms of ones, biases of zeros
        p.data += 0.1 * torch.randn_like(p)
    return Problem(model, (inputs(shape, n, T, 1),), (inputs(shape, 4, T, 2),), **options)


RANDOM = {
    "dropout": lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.Linear(D, 2)),
    "attention": lambda: Fn(lambda s, x: s.a(x, x, x)[0], a=nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True)),
    "attention-fast": lambda: Fn(
        lambda s, x: s.a(s.b(x), x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True),
        b=nn.Linear(D, D),
    ),
    "lstm": lambda: Fn(lambda s, x: s.r(x)[0], r=nn.LSTM(D, 4, 2, dropout=0.3, batch_first=True)),
    "parameter": lambda: Fn(lambda s, x: s.a(x) + F.dropout(s.p, 0.3, s.training), a=nn.Linear(D, D), p=normal(D)),
    "leaf": lambda: around(Leaf(lambda s, x: F.dropout(x * s.g, 0.3, s.training), g=normal(D))),
    "noise-in-eval": lambda: Fn(
        lambda s, x: s.b(s.a(x)), a=nn.Linear(D, D), b=Leaf(lambda s, x: x + s.g * torch.randn_like(x), g=normal(D))
    ).eval(),
    "gumbel": lambda: Fn(lambda s, x: s.a(x) * F.gumbel_softmax(s.g), a=nn.Linear(D, D), g=normal(D)),
    "spectral-norm": lambda: around(parametrizations.spectral_norm(nn.Linear(D, 4))),
}
