"""Small trainings whose truth can be had: every outcome of leaving samples out is really trained, many models at once.

Nothing here uses the package under test but for its demo's texts and model. Float64: differences of losses would drown otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from adam_ghost.demo.data import VOCABULARY, load_corpus
from adam_ghost.demo.model import GPT


class States(NamedTuple):
    """Weights and Adam's moments of ``M`` models, by parameter: each ``[M, *shape]``."""

    w: dict[str, Tensor]
    m: dict[str, Tensor]
    v: dict[str, Tensor]


@dataclass
class Task:
    """A training run: which samples meet in which step, under AdamW without decay."""

    name: str
    model: nn.Module
    samples: tuple[Tensor, ...]  # each [N, ...]
    held_out: tuple[Tensor, ...]
    losses: Callable[..., Tensor]  # of the model's output and the samples: [n]
    batches: list[Tensor]  # per step, indices of samples
    bad: Tensor  # [N] bool
    lr: float
    beta2: float = 0.999
    beta1: float = 0.9
    eps: float = 1e-8

    def take(self, index: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[index] for x in self.samples)

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The mean loss of a batch by the task's own model."""
        return self.losses(self.model(batch[0]), *batch[1:]).mean()

    def val_loss(self) -> Tensor:
        return self.loss(self.held_out)

    def optimizer(self) -> torch.optim.Optimizer:
        options = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}
        return torch.optim.Adam(self.model.parameters(), **options)

    # many models at once

    @cached_property
    def _gradients(self) -> Callable[..., dict[str, Tensor]]:
        def weighted(w: dict[str, Tensor], batch: tuple[Tensor, ...], weight: Tensor) -> Tensor:
            losses = self.losses(functional_call(self.model, w, (batch[0],)), *batch[1:])
            return (losses * weight).sum() / len(weight)

        return vmap(grad(weighted), in_dims=(0, None, 0))

    def start(self, M: int) -> States:
        w = {k: p.detach().expand(M, *p.shape).clone() for k, p in self.model.named_parameters()}
        return States(w, *({k: torch.zeros_like(x) for k, x in w.items()} for _ in range(2)))

    def train(self, states: States, first: int, last: int, weight: Callable[[int], Tensor]) -> States:
        """Steps ``first .. last`` (1-based) of ``M`` models; ``weight(step)`` ``[M, n]`` multiplies the samples' losses."""
        w, m, v = ({k: x.clone() for k, x in part.items()} for part in states)
        for t in range(first, last + 1):
            g = self._gradients(w, self.take(self.batches[t - 1]), weight(t))
            for k in w:
                m[k].lerp_(g[k], 1 - self.beta1)
                v[k].mul_(self.beta2).addcmul_(g[k], g[k], value=1 - self.beta2)
                root = (v[k] / (1 - self.beta2**t)).sqrt_().add_(self.eps)
                w[k].addcdiv_(m[k], root, value=-self.lr / (1 - self.beta1**t))
        return States(w, m, v)

    def outcomes(self, states: States) -> Tensor:
        """``[M]``: the validation losses."""

        def one(w: dict[str, Tensor]) -> Tensor:
            return self.losses(functional_call(self.model, w, (self.held_out[0],)), *self.held_out[1:]).mean()

        with torch.no_grad():
            return vmap(one)(states.w)


def digits(seed: int, lr: float = 1e-3, beta2: float = 0.999, epochs: int = 10) -> Task:
    """1,000 handwritten digits, a fifth with a wrong label; an MLP of 1,834 parameters in batches of 50."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=generator)
    x, y = images[order].double() / 16, labels[order]
    bad = torch.rand(1000, generator=generator) < 0.2
    wrong = y[:1000].clone()
    wrong[bad] = (wrong[bad] + torch.randint(1, 10, (int(bad.sum()),), generator=generator)) % 10
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    batches = [b for _ in range(epochs) for b in torch.randperm(1000, generator=generator).split(50)]

    def losses(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    return Task("digits", model, (x[:1000], wrong), (x[1000:1300], y[1000:1300]), losses, batches, bad, lr, beta2)


def texts(seed: int, lr: float = 1e-3, beta2: float = 0.999, epochs: int = 10) -> Task:
    """320 texts of 32 characters, prose and code, a fifth garbled; a GPT of two layers in batches of 16."""
    corpus = load_corpus(320, 64, 33, seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = GPT(VOCABULARY, 32, layers=2, width=32, heads=2).double()
    batches = [b for _ in range(epochs) for b in torch.randperm(320, generator=generator).split(16)]

    def losses(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.mT, y, reduction="none").mean(1)

    samples, held_out = ((x[:, :-1], x[:, 1:]) for x in (corpus.tokens, corpus.target))
    bad = torch.tensor([d == "corrupted" for d in corpus.domains])
    return Task("texts", model, samples, held_out, losses, batches, bad, lr, beta2)


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "texts": texts}
