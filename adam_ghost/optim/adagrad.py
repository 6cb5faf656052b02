"""``torch.optim.Adagrad``."""

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
    lr_decay: float
    eps: float
    weight_decay: float
    maximize: bool


class AdagradState(Elementwise):
    """The state is the sum of all squared gradients."""

    kinds = 1
    slots = (None, 0, None)

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, total: Tensor) -> tuple[Value, Any]:
        x = x + w * s.weight_decay
        squares = square(x) + total
        return x / (root(squares) + s.eps) * (s.lr / (1 + (s.t - 1) * s.lr_decay)), squares

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        slowed = 1 / (1 + (s.t - 1) * s.lr_decay)
        found = Coefficients(SIZES.index("root"), s.lr, s.maximize, s.weight_decay, eps=s.eps, adaptive=slowed)
        return found._replace(square_v=1.0, square_x=1.0)

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None]]:
        scalars = Scalars(
            t=number(held.get("step", 0)) + 1,
            lr=number(group["lr"]),
            lr_decay=float(group["lr_decay"]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, (held.get("sum"),)

    @staticmethod
    def bounded(s: Scalars, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (raised(state[0], g * g, share, 1.0, 1.0),)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s, (total,) = self._rows[p].scalars, self._rows[p].state
        return None if total is None else typical_gradient(None, total / max(s.t - 1, 1))

    def steps_taken(self, default: int) -> int:
        counts = [row.scalars.t for row in self._rows.values()]  # its state is there from the beginning
        return max((default if isinstance(t, Tensor) else int(t) - 1 for t in counts), default=0)


register(torch.optim.Adagrad, AdagradState.of)
