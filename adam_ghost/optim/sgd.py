"""``torch.optim.SGD``: linear in the gradient, so that its secant is the same everywhere."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value
from adam_ghost.optim.defined import Elementwise
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    lr: Scalar
    momentum: float
    dampening: float
    weight_decay: Scalar
    nesterov: bool
    maximize: bool
    first: bool  # the buffer is the first gradient itself


class SGDState(Elementwise):
    """The state is the momentum's buffer, where there is momentum."""

    kinds = 1
    slots = (0, None, None)

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, buffer: Tensor) -> tuple[Value, Any]:
        x = x + w * s.weight_decay
        if not s.momentum:
            return x * s.lr, buffer
        new = x if s.first else x * (1 - s.dampening) + buffer * s.momentum
        return (x + new * s.momentum if s.nesterov else new) * s.lr, new

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        kept, new = (0.0, 1.0) if s.first or not s.momentum else (s.momentum, 1 - s.dampening)
        if s.nesterov:
            kept, new = kept * s.momentum, new * s.momentum + 1
        return Coefficients(SIZES.index("root"), s.lr, s.maximize, s.weight_decay, kept, new, plain=1.0)

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None]]:
        buffer = held.get("momentum_buffer")
        scalars = Scalars(
            lr=number(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=number(group["weight_decay"]),
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            first=buffer is None,
        )
        return scalars, (buffer,)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        row = self._rows[p]
        (buffer,) = row.state
        return None if buffer is None else buffer * (1 - row.scalars.momentum)

    def steps_taken(self, default: int) -> int:
        return default  # which is told by no state


register(torch.optim.SGD, SGDState.of)
