"""``torch.optim.NAdam``: Adam with Nesterov's momentum, after a schedule of its own."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.moments import Moments, adam_scalars
from adam_ghost.optim.one_pass import SIZES, Coefficients
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

    def weights(self) -> tuple[Scalar, Scalar]:
        """Of the gradient and of the first moment in the step."""
        mu, following = self.mu(self.t), self.mu(self.t + 1)
        product = self.mu_product * mu
        return (1 - mu) / (1 - product), following / (1 - product * following)


class NAdamState(Moments):
    """The state: both moments."""

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Value, Any, Any]:
        x = x if s.decoupled else x + w * s.weight_decay
        mean = x * (1 - s.beta1) + exp_avg * s.beta1
        squares = square(x) * (1 - s.beta2) + exp_avg_sq * s.beta2
        now, ahead = s.weights()
        size = root(squares / (1 - s.beta2**s.t)) + s.eps
        by = (x * now + mean * ahead) / size * s.lr
        return by + w * (s.lr * s.weight_decay) if s.decoupled else by, mean, squares

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        now, ahead = s.weights()
        l2, decay = (0.0, s.lr * s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
        found = Coefficients(SIZES.index("root"), s.lr, s.maximize, l2, ahead * s.beta1, now + ahead * (1 - s.beta1), decay=decay)
        root = (1 - s.beta2**s.t) ** -0.5
        return found._replace(square_v=s.beta2, square_x=1 - s.beta2, root=root, eps=s.eps, adaptive=1.0)

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
