"""``torch.optim.RAdam``: Adam whose first steps, while the second moment is young, leave that out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.moments import Moments, adam_scalars
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import register


class Scalars(NamedTuple):
    t: Scalar
    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool

    def rectified(self) -> tuple[Scalar, Scalar]:
        """The share of the step that goes by the second moment, times its rectification; and that of plain momentum, 0 or 1."""
        most, bc2 = 2 / (1 - self.beta2) - 1, 1 - self.beta2**self.t
        length = most - 2 * self.t * self.beta2**self.t / bc2
        known = length > 5.0  # [] where the step is counted on the device
        clear = torch.where(known, length, 6.0) if isinstance(length, Tensor) else max(length, 6.0 * (not known))
        factor = ((clear - 4) * (clear - 2) * most / ((most - 4) * (most - 2) * clear)) ** 0.5
        return factor * known, 1.0 * ~known if isinstance(known, Tensor) else float(not known)


class RAdamState(Moments):
    """The state: both moments."""

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Value, Any, Any]:
        x = x if s.decoupled else x + w * s.weight_decay
        mean = x * (1 - s.beta1) + exp_avg * s.beta1
        squares = square(x) * (1 - s.beta2) + exp_avg_sq * s.beta2
        adaptive, plain = s.rectified()
        scaled = mean / (root(squares) + s.eps) * (adaptive * (1 - s.beta2**s.t) ** 0.5)
        by = (scaled + mean * plain) * (s.lr / (1 - s.beta1**s.t))
        return by + w * (s.lr * s.weight_decay) if s.decoupled else by, mean, squares

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        adaptive, plain = s.rectified()
        bc1, bc2 = 1 - s.beta1**s.t, 1 - s.beta2**s.t
        l2, decay = (0.0, s.lr * s.weight_decay) if s.decoupled else (s.weight_decay, 0.0)
        found = Coefficients(SIZES.index("root"), s.lr, s.maximize, l2, s.beta1, 1 - s.beta1, plain=plain / bc1, decay=decay)
        return found._replace(square_v=s.beta2, square_x=1 - s.beta2, eps=s.eps, adaptive=adaptive * bc2**0.5 / bc1)

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        scalars = Scalars(
            **adam_scalars(group, held),
            decoupled=bool(group["decoupled_weight_decay"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, (held.get("exp_avg"), held.get("exp_avg_sq"))


register(torch.optim.RAdam, RAdamState.of)
