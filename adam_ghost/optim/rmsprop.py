"""``torch.optim.RMSprop``, centered or not, with momentum or not."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.defined import Elementwise
from adam_ghost.optim.history import raised, typical_gradient
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    t: Scalar
    lr: Scalar
    alpha: float
    eps: float
    momentum: float
    weight_decay: float
    centered: bool
    maximize: bool


class RMSpropState(Elementwise):
    """The state: running means of the squared gradient and of the gradient (centered), the momentum's buffer."""

    kinds = 3
    slots = (1, 0, 2)

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, square_avg: Tensor, grad_avg: Tensor, buffer: Tensor) -> tuple[Value, Any, Any, Any]:
        x = x + w * s.weight_decay
        squares = square(x) * (1 - s.alpha) + square_avg * s.alpha
        mean = x * (1 - s.alpha) + grad_avg * s.alpha
        by = x / (root(squares - square(mean) if s.centered else squares) + s.eps)
        by = by + buffer * s.momentum
        return by * s.lr, squares, mean if s.centered else grad_avg, by if s.momentum else buffer

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        found = Coefficients(SIZES.index("root"), s.lr, s.maximize, s.weight_decay, eps=s.eps, adaptive=1.0)
        found = found._replace(square_v=s.alpha, square_x=1 - s.alpha, third=s.lr * s.momentum)
        return found._replace(off_m=s.alpha, off_x=1 - s.alpha) if s.centered else found

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        scalars = Scalars(
            t=number(held.get("step", 0)) + 1,
            lr=number(group["lr"]),
            alpha=float(group["alpha"]),
            eps=float(group["eps"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            centered=bool(group["centered"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, tuple(held.get(k) for k in ("square_avg", "grad_avg", "momentum_buffer"))

    @staticmethod
    def bounded(s: Scalars, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return raised(state[0], g * g, share, 1 - s.alpha, s.alpha), *state[1:]

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s, (square_avg, grad_avg, _) = self._rows[p].scalars, self._rows[p].state
        if square_avg is None:
            return None
        return typical_gradient(grad_avg, square_avg / (1 - s.alpha ** (s.t - 1)))


register(torch.optim.RMSprop, RMSpropState.of)
