"""Models that people write themselves, in plain torch: language models, diffusion, scans, autoencoders, recommenders."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from architecture import WAYS, N
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, T, D = 16, 6, 8


class FusedAttention(nn.Module):
    """Causal attention of two heads, of queries, keys and values that one layer gives."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, 2, C // 2).transpose(1, 2) for y in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class NanoGPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, D), nn.Embedding(T, D)
        self.norms, self.norm = nn.ModuleList(nn.LayerNorm(D) for _ in range(2)), nn.LayerNorm(D)
        self.attention, self.mlp = FusedAttention(), nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norm(x))


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Llama(nn.Module):
    """Rotary positions as complex numbers, two query heads to one of keys and values, a gated perceptron."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY, bias=False)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(D, d, bias=False) for d in (D, D // 2, D // 2, D))
        self.w1, self.w3, self.w2 = nn.Linear(D, 12, bias=False), nn.Linear(D, 12, bias=False), nn.Linear(12, D, bias=False)
        self.norms = nn.ModuleList(RMSNorm() for _ in range(3))
        angles = torch.outer(torch.arange(T), 100.0 ** -torch.linspace(0, 1, D // 4, dtype=torch.float64))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)  # [T, D / 4]

    def rotate(self, x: Tensor) -> Tensor:  # [B, T, heads, D / 2]
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.rotations[None, :, None]
        return torch.view_as_real(turned).flatten(3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        y = self.norms[0](x)
        q, k, v = (w(y).unflatten(-1, (-1, D // 2)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q).transpose(1, 2), self.rotate(k).transpose(1, 2)
        k, v = k.repeat_interleave(2, dim=1), v.transpose(1, 2).repeat_interleave(2, dim=1)
        scores = (q @ k.mT / (D // 2) ** 0.5).masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
        x = x + self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        return self.head(self.norms[2](x + self.w2(F.silu(self.w1(y)) * self.w3(y))))


def waves(t: Tensor) -> Tensor:
    """``[n, D]``: the sinusoids of a time of noise, ``[n]``."""
    angles = t[:, None] * torch.exp(-torch.arange(D // 2, dtype=t.dtype))
    return torch.cat([angles.cos(), angles.sin()], -1)


class DiT(nn.Module):
    """Patches whose norms are scaled and shifted by time and class."""

    def __init__(self):
        super().__init__()
        self.patches, self.positions = nn.Conv2d(2, D, 2, stride=2), nn.Parameter(torch.randn(1, 16, D))
        self.time, self.classes = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D)), nn.Embedding(5, D)
        self.modulation, self.attention = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D)), FusedAttention()
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU("tanh"), nn.Linear(2 * D, D))
        self.out = nn.Linear(D, 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(self.time(waves(t)) + self.classes(y)).unsqueeze(1).chunk(6, -1)
        h = h + gate * self.attention(self.norm(h) * (1 + scale) + shift)
        h = h + gate2 * self.mlp(self.norm(h) * (1 + scale2) + shift2)
        return torch.einsum("nhwpqc->nchpwq", self.out(h).view(-1, 4, 4, 2, 2, 2)).reshape(x.shape)


class Block(nn.Module):
    """Of a U-Net: convolutions between group norms, to which time is added."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm, self.conv, self.conv2 = nn.GroupNorm(2, c_in), nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 1)
        self.time, self.skip = nn.Linear(D, c_out), nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x))) + self.time(t)[:, :, None, None]
        return self.conv2(F.silu(h)) + self.skip(x)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.down, self.middle, self.up = nn.Conv2d(2, 4, 3, padding=1), Block(4, 8), Block(8, 8), Block(12, 4)
        self.smaller, self.larger, self.last = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(4, 2, 1)
        self.time, self.qkv = nn.Linear(D, D), nn.Conv1d(8, 24, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t, first = F.silu(self.time(waves(t))), self.first(x)
        h = self.middle(self.down(self.smaller(first), t), t)
        q, k, v = self.qkv(h.flatten(2)).chunk(3, 1)
        h = h + (v @ (q.mT @ k / 8**0.5).softmax(-1).mT).view_as(h)
        return self.last(self.up(torch.cat([self.larger(h), first], 1), t))


class Scan(nn.Module):
    """Mamba's selective scan, a step after the other."""

    def __init__(self):
        super().__init__()
        self.tokens, self.inner, self.conv = (
            nn.Embedding(VOCABULARY, D),
            nn.Linear(D, 4 * D),
            nn.Conv1d(2 * D, 2 * D, 3, groups=2 * D),
        )
        self.steps, self.selected = nn.Linear(2 * D, 2 * D), nn.Linear(2 * D, 8, bias=False)
        self.A, self.skip = nn.Parameter(torch.randn(2 * D, 4)), nn.Parameter(torch.randn(2 * D))
        self.out, self.head = nn.Linear(2 * D, D), nn.Linear(D, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x, gate = self.inner(self.tokens(ids)).chunk(2, -1)
        x = F.silu(self.conv(F.pad(x.mT, (2, 0))).mT)  # [B, T, 2 D]
        delta, (B, C) = F.softplus(self.steps(x)), self.selected(x).chunk(2, -1)
        kept = torch.exp(delta[..., None] * -torch.exp(self.A))  # [B, T, 2 D, 4]
        added = (delta * x)[..., None] * B[:, :, None]
        state, found = torch.zeros_like(added[:, 0]), []
        for t in range(x.shape[1]):
            state = kept[:, t] * state + added[:, t]
            found.append(torch.einsum("bds,bs->bd", state, C[:, t]))
        y = (torch.stack(found, 1) + x * self.skip) * F.silu(gate)
        return self.head(self.out(y))


class VAE(nn.Module):
    """Its noise is an argument; the divergence of each sample's code is a pixel more."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.Flatten(), nn.Linear(32, 2 * D)
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(D, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.ELU(),
            nn.ConvTranspose2d(4, 2, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        again = self.decoder(mean + noise * torch.exp(0.5 * log_variance))
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1, keepdim=True)
        return torch.cat([(again - x).flatten(1), divergence], 1)


class TwoTowers(nn.Module):
    """A user's bag of items and a candidate, each embedded and compared; bags of weighted features beside dense ones."""

    def __init__(self):
        super().__init__()
        self.history, self.features = nn.EmbeddingBag(VOCABULARY, D, mode="mean"), nn.EmbeddingBag(VOCABULARY, D, mode="sum")
        self.items, self.biases = nn.Embedding(VOCABULARY, D), nn.Embedding(VOCABULARY, 1)
        self.user, self.item = (nn.Sequential(nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D)) for _ in range(2))
        self.dense, self.cross = nn.Linear(3, D), nn.Bilinear(D, D, 2)

    def forward(self, history: Tensor, features: Tensor, weights: Tensor, dense: Tensor, item: Tensor) -> Tensor:
        user = self.user(torch.cat([self.history(history), self.dense(dense)], 1))
        found = self.item(torch.cat([self.items(item), self.features(features, per_sample_weights=weights)], 1))
        alike = F.cosine_similarity(user, found)[:, None] + (user * found).sum(1, keepdim=True) + self.biases(item)
        return torch.cat([alike, self.cross(user, found)], 1)


@dataclass
class Plain:
    """A class of this file, and what makes its arguments of a generator."""

    of: type[nn.Module]
    arguments: Callable[[torch.Generator], tuple[Tensor, ...]]
    ways: tuple[str, ...] = WAYS

    @property
    def model(self) -> str:
        return self.of.__name__

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        made = self.of()
        for p in made.parameters():
            p.data += 0.1 * torch.randn_like(p)
        for module in made.modules():  # complex buffers stay complex
            module._apply(lambda x: x if x.is_complex() else x.double() if x.is_floating_point() else x, recurse=False)
        return made

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        return self.arguments(torch.Generator().manual_seed(seed))


def _ids(g: torch.Generator, *shape: int, most: int = VOCABULARY) -> Tensor:
    return torch.randint(most, (N, *shape), generator=g)


def _noise(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=g, dtype=torch.float64)


def _bags(g: torch.Generator) -> tuple[Tensor, ...]:
    return _ids(g, 5), _ids(g, 3), _noise(g, 3), _noise(g, 3), _ids(g)


PLAIN: dict[str, Plain] = {
    "plain-nanogpt": Plain(NanoGPT, lambda g: (_ids(g, T),)),
    "plain-llama": Plain(Llama, lambda g: (_ids(g, T),)),
    "plain-mamba": Plain(Scan, lambda g: (_ids(g, T),)),
    "plain-dit": Plain(DiT, lambda g: (_noise(g, 2, 8, 8), _noise(g).abs(), _ids(g, most=5))),
    "plain-unet": Plain(UNet, lambda g: (_noise(g, 2, 8, 8), _noise(g).abs())),
    "plain-vae": Plain(VAE, lambda g: (_noise(g, 2, 8, 8), _noise(g, D))),
    "plain-two-towers": Plain(TwoTowers, _bags),
}
