"""Small trainings, and what each of their samples did: by differentiating through every step of the optimizer.

Each sample's loss gets a weight, 1, and the whole training is unrolled with a graph: the derivative of the validation loss
after some step by a sample's weight is its credit, with the sign turned.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import adam_ghost as ag
from adam_ghost.demo.model import GPT

N, D, CLASSES, VOCABULARY, CONTEXT = 6, 5, 3, 13, 6


def mlp(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Dropout(dropout), nn.LayerNorm(7), nn.Linear(7, CLASSES)).double()


class Sometimes(nn.Module):
    """A part of it takes part in batches whose third number is positive."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.extra = nn.Linear(D, 7, dtype=torch.float64), nn.Linear(D, CLASSES, dtype=torch.float64)
        self.head = nn.Linear(7, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(torch.tanh(self.inner(x)))
        return y + torch.tanh(self.extra(x)) if x.flatten()[2] > 0 else y


def gpt(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return GPT(VOCABULARY, CONTEXT, 1, 8, 2, dropout).double()


def conv() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 16, CLASSES)
    ).double()


def points(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=g, dtype=torch.float64), torch.randint(0, CLASSES, (n,), generator=g)


def texts(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, VOCABULARY, (n, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))
    return x[:, :-1], x[:, 1:]


def pictures(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=g, dtype=torch.float64), torch.randint(0, CLASSES, (n,), generator=g)


def sample_losses(out: Tensor, y: Tensor) -> Tensor:
    """``[n]`` of logits ``[n, C]`` or ``[n, T, C]``."""
    losses = F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction="none")
    return losses.view(len(y), -1).mean(1)


@dataclass
class Taken:
    """One step as the loop took it."""

    micro: list[tuple[int, Tensor, Tensor]]  # seed of the forward pass, x, y
    hyper: dict[str, dict[str, Any]]  # by parameter that had a gradient
    clipped: bool


@dataclass
class Training:
    """A loop; ``train`` runs it with windows, or plainly."""

    model: nn.Module
    make: Callable[[nn.Module], torch.optim.Optimizer]
    data: Callable[..., tuple[Tensor, Tensor]] = points
    parts: tuple[int, ...] = (N,)  # samples per micro-batch
    divided: str = "train_loss"  # by the number of micro-batches: in train_loss, or by the loop
    max_norm: float | None = None
    targets: int | None = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None  # of learning rates
    scaler: Any = None
    bad: tuple[int, ...] = ()  # batches whose gradients are not finite
    without: tuple[int, int, int] | None = None  # batch, micro-batch and place of a sample that has no share
    clip: Callable[[list[Tensor], float], Any] = nn.utils.clip_grad_norm_
    taken: list[Taken] = field(default_factory=list)
    run: Any = None

    def __post_init__(self):
        self.trained = self.model  # what the loop calls: the model, or the model compiled
        self.optimizer = self.make(self.model)
        self.rates = self.schedule(self.optimizer) if self.schedule else None
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.number = 0  # of the next batch

    def validation(self, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        was = self.model.training
        self.model.eval()
        losses = []
        for k in range(self.targets or 1):
            x, y = self.data(900 + k, 9)
            losses.append(sample_losses((call or self.trained)(x), y).mean())
        self.model.train(was)
        return losses[0] if self.targets is None else torch.stack(losses)

    def train_loss(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, y = inputs
        loss = sample_losses(self.trained(x), y).mean()
        return loss / len(self.parts) if self.divided == "train_loss" else loss

    def attach(self, **options: Any) -> "Training":
        options = {
            "window": 4,
            "ahead": 2,
            "bounded": False,
            "feedback": "double",
            "train_loss": self.train_loss,
            "strict": True,
        } | options
        self.run = ag.InRun(self.trained, self.optimizer, self.validation, options.pop("schedule", "window"), **options)
        return self

    def batches(self, number: int) -> list[tuple[int, Tensor, Tensor]]:
        return [(1000 * number + m, *self.data(1000 * number + m, n)) for m, n in enumerate(self.parts)]

    def train(self, steps: int) -> "Training":
        for _ in range(steps):
            self.step()
        return self

    def step(self) -> None:
        micro = self.batches(self.number)
        for m, (seed, x, y) in enumerate(micro):
            if self.run is not None:
                self.run.batch([f"{self.number}.{m}.{i}" for i in range(len(y))], inputs=(x, y))
            torch.manual_seed(seed)
            loss = self.train_loss((x, y))
            if self.without is not None and self.without[:2] == (self.number, m):
                torch.manual_seed(seed)
                share = sample_losses(self.trained(x), y)[self.without[2]] / len(y)
                loss = loss - (share / len(self.parts) if self.divided == "train_loss" else share)
            if self.divided == "loop":
                loss = loss / len(self.parts)
            if self.number in self.bad:
                loss = loss * float("inf")
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        params = [p for p in self.model.parameters() if p.grad is not None]
        hyper = self.hyper()
        norm = None
        if self.max_norm is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            norm = self.clip(params, self.max_norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.number not in self.bad:
            self.taken.append(Taken(micro, hyper, norm is not None and bool(norm > self.max_norm)))
        self.optimizer.zero_grad()
        if self.rates:
            self.rates.step()
        self.number += 1

    def hyper(self) -> dict[str, dict[str, Any]]:
        names = {p: name for name, p in self.model.named_parameters()}
        found = {}
        for group in self.optimizer.param_groups:
            values = {k: float(group[k]) for k in ("lr", "eps", "weight_decay", "maximize", "amsgrad")}
            values |= {"beta1": group["betas"][0], "beta2": group["betas"][1]}
            values["decoupled"] = group.get("decoupled_weight_decay", isinstance(self.optimizer, torch.optim.AdamW))
            found |= {names[p]: values for p in group["params"] if p.grad is not None}
        return found

    def scores(self) -> Tensor:
        """``[samples]`` or ``[samples, K]``, in the order of the steps."""
        return torch.from_numpy(self.run.scores().total)

    def credit(
        self,
        first: int,
        last: int,
        end: int,
        feedback: str = "exact",
        state: dict[str, tuple] | None = None,
        bounded: bool = False,
    ) -> Tensor:
        """What the samples of steps ``first .. last``, counted from 1, did to the validation loss after step ``end``.

        ``state``: of the optimizer at the start, by parameter: both moments, the second's maximum and the steps taken.
        """
        weights = {name: x.clone().requires_grad_() for name, x in self.start.items()}
        state = dict(state or {})
        eps = [[torch.ones(len(y), dtype=torch.float64, requires_grad=True) for _, _, y in t.micro] for t in self.taken]
        for t, step_eps in zip(self.taken[:end], eps, strict=False):
            grads = self._gradient(weights, list(t.hyper), t.micro, step_eps, feedback)
            if self.max_norm is not None:
                norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
                factor = (self.max_norm / (norm + 1e-6)).clamp(max=1)
                grads = [g * factor for g in grads]
            for (name, s), g in zip(t.hyper.items(), grads, strict=True):
                share = g.detach().norm() / (g.numel() * sum(self.parts)) ** 0.5 if bounded else 0.0
                weights[name], state[name] = _adam(s, weights[name], g, state.get(name), share)
        losses = self.validation(lambda x: functional_call(self.model, weights, (x,)))
        wanted = [e for step_eps in eps[first - 1 : last] for e in step_eps]
        found = [torch.cat(torch.autograd.grad(x, wanted, retain_graph=True)) for x in losses.reshape(-1)]
        return -found[0] if self.targets is None else -torch.stack(found, 1)

    def _gradient(self, weights, names, micro, step_eps, feedback):
        total = [torch.zeros_like(weights[name]) for name in names]
        for (seed, x, y), e in zip(micro, step_eps, strict=True):

            def output(w, x=x, seed=seed):
                torch.manual_seed(seed)
                return functional_call(self.model, w, (x,))

            def loss(out, y=y, e=e):
                return (sample_losses(out, y) * e).mean() / len(micro)

            with sdpa_kernel(SDPBackend.MATH):
                fixed = {name: w.detach().requires_grad_() for name, w in weights.items()}
                at = weights if feedback == "exact" else fixed
                out = output(at)
                # in Gauss-Newton the loss' slope moves with the output, and the model's derivative stays
                moving = output(weights) if feedback == "gauss-newton" else out
                (slope,) = torch.autograd.grad(loss(moving), moving, create_graph=True)
                found = torch.autograd.grad(out, [at[name] for name in names], slope, create_graph=True, allow_unused=True)
            total = [a if g is None else a + g for a, g in zip(total, found, strict=True)]
        return total


def _adam(s: dict[str, Any], w: Tensor, g: Tensor, state: tuple | None, share: float | Tensor = 0.0) -> tuple[Tensor, tuple]:
    """The weights and state after a step.

    Its derivative, not what it does, is taken as if at least ``share`` squared had gone into the second moment.
    """
    m, v, v_max, t = state or (torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w), 0)
    t, given = t + 1, g
    g = -g if s["maximize"] else g
    w, g = (w * (1 - s["lr"] * s["weight_decay"]), g) if s["decoupled"] else (w, g + s["weight_decay"] * w)
    m = s["beta1"] * m + (1 - s["beta1"]) * g
    lack = (1 - s["beta2"]) * (share**2 - given.square()) - s["beta2"] * v
    v = s["beta2"] * v + (1 - s["beta2"]) * g * g
    v_max = torch.maximum(v_max, v) if s["amsgrad"] else v

    def moved(second: Tensor) -> Tensor:
        bc1, bc2 = 1 - s["beta1"] ** t, 1 - s["beta2"] ** t
        root = torch.where(second > 0, torch.where(second > 0, second / bc2, 1.0).sqrt(), 0.0)
        return s["lr"] / bc1 * m / (root + s["eps"])

    bounded = moved(v_max + lack.detach().clamp(min=0))
    return w - (bounded + (moved(v_max) - bounded).detach()), (m, v, v_max, t)


def apart(got: Tensor, want: Tensor) -> float:
    """The relative difference."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return float((got - want).norm() / want.norm())
