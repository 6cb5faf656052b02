"""``torch.optim.NAdam``: Adam with Nesterov's momentum, after a schedule of its own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.defined import Elementwise, raised, typical_gradient
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


class NAdamState(Elementwise):
    """The state: both moments."""

    kinds = 2

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
            t=number(held.get("step", 0)) + 1,
            mu_product=number(held.get("mu_product", 1.0)),
            lr=number(group["lr"]),
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            momentum_decay=float(group["momentum_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, (held.get("exp_avg"), held.get("exp_avg_sq"))

    @staticmethod
    def bounded(s: Scalars, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[0], raised(state[1], g * g, share, 1 - s.beta2, s.beta2)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s, (exp_avg, exp_avg_sq) = self._rows[p].scalars, self._rows[p].state
        return None if exp_avg_sq is None else typical_gradient(exp_avg, exp_avg_sq / (1 - s.beta2 ** (s.t - 1)))


register(torch.optim.NAdam, NAdamState.of)
