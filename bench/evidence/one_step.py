"""One step: scores against three truths, each computed here, from the optimizer's arithmetic and single gradients.

*The true step* is the game whose coalitions really take Adam's step with their part of the gradient (its Shapley values by
sampled permutations and their reverses); *the paper's game* adds up the Adam steps of single samples (arXiv 2602.00329);
*leaving one out* takes each sample's part out of the step once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import adam_ghost as ag
from bench.evidence.tasks import TASKS, Task, at_once
from bench.fidelity import predicted
from bench.statistics import correlation, relative_error

METHODS: dict[str, tuple[str, str] | None] = {
    "SGD rule": ("sgd", "current"),
    "the paper's rule": ("frozen", "current"),
    "lookahead": None,
    "midpoint": ("secant", "midpoint"),
    "gauss": ("secant", "gauss"),
}
TRUTHS = ("true step", "paper's game", "leaving one out")
STEPS = (2, 10, 30, 60, 100)
COALITIONS = 512  # about as many are tried per game and step: permutations, each with its reverse
_AT_ONCE = 256  # coalitions whose losses are computed together


class Game:
    """What any coalition's step does to the validation loss; gradients and weights are flat, ``[D]``."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, shares: Tensor):
        self.task, self.shares = task, shares  # [n, D]: they add up to the gradient that is used
        self.named = dict(task.model.named_parameters())
        (group,) = optimizer.param_groups
        states = [optimizer.state[p] for p in self.named.values()]
        self.m, self.v = (torch.cat([s[k].flatten() for s in states]) for k in ("exp_avg", "exp_avg_sq"))
        self.t = int(states[0]["step"]) + 1
        self.w = torch.cat([p.detach().flatten() for p in self.named.values()])
        self.group = group
        self.nobody = self.stepped(torch.zeros_like(self.w))
        self.singles = self.stepped(shares) - self.nobody

    def stepped(self, g: Tensor) -> Tensor:
        """``[.., D]`` weights after AdamW's step with gradients ``g`` ``[.., D]``."""
        (beta1, beta2), lr = self.group["betas"], self.group["lr"]
        m = beta1 * self.m + (1 - beta1) * g
        v = beta2 * self.v + (1 - beta2) * g * g
        root = (v / (1 - beta2**self.t)).sqrt() + self.group["eps"]
        return self.w * (1 - lr * self.group["weight_decay"]) - lr / (1 - beta1**self.t) * m / root

    def losses(self, weights: Tensor) -> Tensor:
        """``[M]`` validation losses at weights ``[M, D]``."""
        task = self.task

        def one(w: Tensor) -> Tensor:
            parts = w.split([p.numel() for p in self.named.values()])
            own = {k: x.view_as(p) for (k, p), x in zip(self.named.items(), parts, strict=True)}
            return task.losses(functional_call(task.model, own, (task.held_out[0],)), *task.held_out[1:]).mean()

        with torch.no_grad():
            return torch.cat([at_once(one)(part) for part in weights.split(_AT_ONCE)])

    def shapley(self, weights: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
        """``[n]`` values of the game ``weights(kept [M, n]) -> [M, D]``, and their standard errors."""
        n = len(self.shares)
        permutations = max(4, COALITIONS // (2 * n))
        generator = torch.Generator().manual_seed(seed)
        found = torch.zeros(permutations, n, dtype=torch.float64)
        for k in range(permutations):
            order = torch.randperm(n, generator=generator)
            for players in (order, order.flip(0)):
                kept = torch.zeros(n + 1, n, dtype=torch.float64)
                for place, i in enumerate(players.tolist(), 1):
                    kept[place:, i] = 1
                found[k, players] -= self.losses(weights(kept)).diff() / 2
        return found.mean(0), found.std(0) / permutations**0.5

    def truths(self, seed: int) -> tuple[dict[str, Tensor], float]:
        """``[n]`` per name of ``TRUTHS``, and the relative standard error of the first."""
        values, error = self.shapley(lambda kept: self.stepped(kept @ self.shares), seed)
        additive, _ = self.shapley(lambda kept: self.nobody + kept @ self.singles, seed)
        n = len(self.shares)
        without = self.losses(self.stepped((1 - torch.eye(n, dtype=torch.float64)) @ self.shares))
        everyone = self.losses(self.stepped(self.shares.sum(0)[None]))
        return dict(zip(TRUTHS, (values, additive, without - everyone), strict=True)), float(error.norm() / values.norm())


def shares_of(task: Task, batch: tuple[Tensor, ...], seed: int) -> Tensor:
    """``[n, D]``: each sample's part of the mean loss' gradient, one after another, all in one forward pass (one dropout mask)."""
    torch.manual_seed(seed)
    losses = task.losses(task.model(batch[0]), *batch[1:]) / len(batch[0])
    params = list(task.model.parameters())
    rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def measure(
    task: str, seed: int, batch: int = 16, lr: float = 1e-3, beta2: float = 0.999, clip: float | None = None, decay: float = 0.0,
    dropout: float = 0.0, steps: tuple[int, ...] = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """R and relative L2 of every method against every truth at several steps of one training."""
    options = {"dropout": dropout} if dropout else {}
    t = TASKS[task](seed, lr, beta2, epochs=1 + max(steps) * batch // 320, batch=batch, held_out=16, **options)
    t.decay, t.clip = decay, clip
    optimizer, cache = t.optimizer(), ag.LayerCache(t.model, lambda: _evaluated(t))
    rows = []
    for number, index in enumerate(t.batches[: max(steps)], 1):
        batch_of = t.take(index)
        torch.manual_seed(number)
        if number in steps:
            with cache:
                t.loss(batch_of).backward()
        else:
            t.loss(batch_of).backward()
        factor = 1.0
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(t.model.parameters(), clip)
            factor = min(1.0, clip / (float(norm) + 1e-6))
        if number in steps:
            rows.append({"step": number} | _compared(t, optimizer, cache, factor * shares_of(t, batch_of, number), number))
        optimizer.step()
        optimizer.zero_grad()
    return {"rows": rows}


def _evaluated(task: Task) -> Tensor:
    task.model.eval()  # the run puts the mode back
    return task.val_loss()


def _compared(task: Task, optimizer: torch.optim.Optimizer, cache: ag.LayerCache, shares: Tensor, seed: int) -> dict[str, Any]:
    scores = {}
    for name, how in METHODS.items():
        scores[name] = ag.attribute(cache, optimizer, rule=how[0], at=how[1]) if how else predicted(cache, optimizer)
    task.model.eval()
    truths, error = Game(task, optimizer, shares).truths(seed)
    task.model.train()
    compare = {t: {m: [correlation(s, v), relative_error(s, v)] for m, s in scores.items()} for t, v in truths.items()}
    return {"yardstick": error, "against": compare}
