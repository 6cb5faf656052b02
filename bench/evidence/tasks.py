"""Small trainings whose truth can be had: every outcome of leaving samples out is really trained, many models at once.

Nothing here uses the package under test but for its demo's texts and model. Float64: differences of losses would drown otherwise.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adam_ghost.demo.data import DOMAINS, VOCABULARY, load_corpus
from adam_ghost.demo.model import GPT


def at_once(function: Callable[..., Any], in_dims: Any = 0) -> Callable[..., Any]:
    """``vmap``, with attention written out: its fused kernels have no batched form and would run model by model."""

    def call(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(function, in_dims)(*args)

    return call


class States(NamedTuple):
    """Weights and Adam's moments of ``M`` models, by parameter: each ``[M, *shape]``."""

    w: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]


@dataclass
class Task:
    """A training run: which samples meet in which step, under AdamW."""

    name: str
    model: nn.Module
    samples: tuple[Tensor, ...]  # each [N, ...]
    held_out: tuple[Tensor, ...]  # what val_loss is of
    test: tuple[Tensor, ...]  # what no score has seen
    losses: Callable[..., Tensor]  # of the model's output and the samples: [n]
    batches: list[Tensor]  # per step, indices of samples
    bad: Tensor  # [N] bool
    groups: Tensor  # [N]: the class on the label, the domain
    lr: float
    beta2: float = 0.999
    beta1: float = 0.9
    eps: float = 1e-8
    decay: float = 0.0
    clip: float | None = None  # norm that gradients are clipped to
    each_target: bool = False  # every held-out sample is a target of its own

    def take(self, index: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[index] for x in self.samples)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of a batch by the task's own model."""
        return self.losses(self.model(batch[0]), *batch[1:]).mean()

    def val_loss(self) -> Tensor:
        """``[]``, or ``[K]`` with a target for each held-out sample."""
        losses = self.losses(self.model(self.held_out[0]), *self.held_out[1:])
        return losses if self.each_target else losses.mean()

    def optimizer(self) -> torch.optim.Optimizer:
        options = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "weight_decay": self.decay}
        return torch.optim.AdamW(self.model.parameters(), **options)

    def single(self) -> "Task":
        """The same in float32: enough where whole trainings differ, in half the time."""
        parts = {
            k: tuple(x.float() if x.is_floating_point() else x for x in getattr(self, k)) for k in ("samples", "held_out", "test")
        }
        return replace(self, model=copy.deepcopy(self.model).float(), **parts)

    def choosing(self, keep: Tensor, seed: int) -> list[Tensor]:
        """As many batches as ``batches``, full ones, drawn epoch by epoch from the samples that ``keep`` ``[N]`` names."""
        kept, size, order = keep.nonzero().squeeze(1), len(self.batches[0]), torch.empty(0, dtype=torch.long)
        generator, drawn = torch.Generator().manual_seed(seed), []
        for _ in self.batches:
            while len(order) < size:
                order = torch.cat([order, kept[torch.randperm(len(kept), generator=generator)]])
            drawn.append(order[:size])
            order = order[size:]
        return drawn

    # many models at once

    @cached_property
    def _gradients(self) -> dict[bool, Callable[..., dict[str, Tensor]]]:
        """Of models that share their batch, and of models that each have their own."""

        def weighted(w: dict[str, Tensor], batch: tuple[Tensor, ...], weight: Tensor) -> Tensor:
            losses = self.losses(functional_call(self.model, w, (batch[0],)), *batch[1:])
            return (losses * weight).sum() / len(weight)

        return {own: at_once(grad(weighted), (0, 0 if own else None, 0)) for own in (False, True)}

    def start(self, M: int) -> States:
        w = {k: p.detach().expand(M, *p.shape).clone() for k, p in self.model.named_parameters()}
        return States(w, *({k: torch.zeros_like(x) for k, x in w.items()} for _ in range(2)))

    def train(
        self,
        states: States,
        first: int,
        last: int,
        weight: Callable[[int], Tensor] | None = None,
        batches: Callable[[int], Tensor] | None = None,
    ) -> States:
        """Steps ``first .. last`` (1-based) of ``M`` models.

        ``weight(step)`` ``[M, n]`` multiplies the samples' losses; ``batches(step)`` ``[M, n]`` are indices in place of the task's.
        """
        w, m, v = ({k: x.clone() for k, x in part.items()} for part in states)
        M = len(next(iter(w.values())))
        for t in range(first, last + 1):
            index = batches(t) if batches else self.batches[t - 1]
            weights = weight(t) if weight else torch.ones(M, index.shape[-1])
            g = self._gradients[index.ndim == 2](w, self.take(index), weights.to(next(iter(w.values())).dtype))
            if self.clip:
                norm = torch.stack([x.flatten(1).square().sum(1) for x in g.values()]).sum(0).sqrt()
                factor = (self.clip / (norm + 1e-6)).clamp(max=1)
                g = {k: x * factor.view(-1, *[1] * (x.ndim - 1)) for k, x in g.items()}
            for k in w:
                w[k].mul_(1 - self.lr * self.decay)
                m[k].lerp_(g[k], 1 - self.beta1)
                v[k].mul_(self.beta2).addcmul_(g[k], g[k], value=1 - self.beta2)
                root = (v[k] / (1 - self.beta2**t)).sqrt_().add_(self.eps)
                w[k].addcdiv_(m[k], root, value=-self.lr / (1 - self.beta1**t))
        return States(w, m, v)

    def outcomes(self, states: States, of: tuple[Tensor, ...] | None = None) -> Tensor:
        """``[M, n]``: the losses of the held-out samples, or of others, by each model."""
        x, *y = of or self.held_out

        def one(w: dict[str, Tensor]) -> Tensor:
            return self.losses(functional_call(self.model, w, (x,)), *y)

        with torch.no_grad():
            return at_once(one)(states.w)

    def accuracy(self, states: States) -> Tensor:
        """``[M]``: share of the test's labels, or characters, that each model finds."""
        x, y = self.test

        def one(w: dict[str, Tensor]) -> Tensor:
            return (functional_call(self.model, w, (x,)).argmax(-1) == y).double().mean()

        with torch.no_grad():
            return at_once(one)(states.w)

    def sample_gradients(self, samples: tuple[Tensor, ...]) -> Tensor:
        """``[n, D]``: gradients of each sample's own loss at the model's weights, parameters flattened in their order."""
        w = {k: p.detach() for k, p in self.model.named_parameters()}

        def one(w: dict[str, Tensor], *sample: Tensor) -> Tensor:
            x, *y = (s[None] for s in sample)
            return self.losses(functional_call(self.model, w, (x,)), *y).sum()

        found = at_once(grad(one), (None, *[0] * len(samples)))(w, *samples)
        return torch.cat([g.flatten(1) for g in found.values()], 1)


def _cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, reduction="none")


def _per_text(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.mT, y, reduction="none").mean(1)


def digits(
    seed: int,
    lr: float = 1e-3,
    beta2: float = 0.999,
    epochs: int = 10,
    batch: int = 50,
    held_out: int = 300,
    convolve: bool = False,
) -> Task:
    """1,000 handwritten digits, a fifth with a wrong label; an MLP of 1,834 parameters, or a CNN of 1,898, in batches of 50."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=generator)
    x, y = images[order].double() / 16, labels[order]
    bad = torch.rand(1000, generator=generator) < 0.2
    wrong = y[:1000].clone()
    wrong[bad] = (wrong[bad] + torch.randint(1, 10, (int(bad.sum()),), generator=generator)) % 10
    torch.manual_seed(seed)
    if convolve:
        model = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
    else:
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
    batches = [b for _ in range(epochs) for b in torch.randperm(1000, generator=generator).split(batch) if len(b) == batch]
    parts = (x[:1000], wrong), (x[1000 : 1000 + held_out], y[1000 : 1000 + held_out]), (x[1300:], y[1300:])
    return Task("digits", model.double(), *parts, _cross_entropy, batches, bad, wrong, lr, beta2)


def texts(
    seed: int, lr: float = 1e-3, beta2: float = 0.999, epochs: int = 10, batch: int = 16, held_out: int = 64, dropout: float = 0.0
) -> Task:
    """320 texts of 32 characters, prose and code, a fifth garbled; a GPT of two layers in batches of 16."""
    corpus = load_corpus(320, held_out + 256, 33, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = GPT(VOCABULARY, 32, layers=2, width=32, heads=2, dropout=dropout).double()
    batches = [b for _ in range(epochs) for b in torch.randperm(320, generator=generator).split(batch) if len(b) == batch]
    parts = ((x[:, :-1], x[:, 1:]) for x in (corpus.tokens, corpus.target[:held_out], corpus.target[held_out:]))
    domains = torch.tensor([DOMAINS.index(d) for d in corpus.domains])
    bad = domains == DOMAINS.index("corrupted")
    return Task("texts", model, *parts, _per_text, batches, bad, domains, lr, beta2)


def poisoned_digits(seed: int, lr: float = 1e-3) -> Task:
    """The digits with right labels, of which a tenth carry a bright corner and the label 0.

    The targets carry the corner too, and their right labels: what someone has who has seen the attack work.
    """
    t = digits(seed, lr)
    generator = torch.Generator().manual_seed(seed + 1)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))  # as digits() draws it
    y = labels[order][:1000]
    bad = (torch.rand(1000, generator=generator) < 0.1) & (y != 0)
    x = torch.where(bad[:, None], _with_corner(t.samples[0]), t.samples[0])
    held_out, test = ((_with_corner(a), b) for a, b in (t.held_out, t.test))
    y = torch.where(bad, 0, y)
    return replace(t, name="digits, poisoned", samples=(x, y), held_out=held_out, test=test, bad=bad, groups=y)


def _with_corner(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1, 8, 8)[:, :2, :2] = 1
    return x


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "digits, CNN": partial(digits, convolve=True),
    "digits, poisoned": poisoned_digits,
    "texts": texts,
}
