"""``torch.optim.NAdam``: Adam with Nesterov's momentum, after a schedule of its own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.moments import Moments, adam_scalars
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    t: Scalar
    mu_product: Scalar  # before the step
    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum_decay: float
    decoupled: bool
    maximize: bool

    def mu(self, t: Scalar) -> Scalar:
        return self.beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))


class NAdamState(Moments):
    """The state: both moments."""

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Value, Any, Any]:
        x = x if s.decoupled else x + w * s.weight_decay
        mean = x * (1 - s.beta1) + exp_avg * s.beta1
        squares = square(x) * (1 - s.beta2) + exp_avg_sq * s.beta2
        mu, following = s.mu(s.t), s.mu(s.t + 1)
        product = s.mu_product * mu
        size = root(squares / (1 - s.beta2**s.t)) + s.eps
        by = (x * ((1 - mu) / (1 - product)) + mean * (following / (1 - product * following))) / size * s.lr
        return by + w * (s.lr * s.weight_decay) if s.decoupled else by, mean, squares

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        scalars = Scalars(
            **adam_scalars(group, held),
            mu_product=number(held.get("mu_product", 1.0)),
            momentum_decay=float(group["momentum_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, (held.get("exp_avg"), held.get("exp_avg_sq"))


register(torch.optim.NAdam, NAdamState.of)
