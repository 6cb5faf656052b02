"""``torch.optim.Adamax``: Adam with the largest gradient, decaying, in place of the root mean square."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, absolute, at_least
from adam_ghost.optim.defined import Elementwise
from adam_ghost.optim.history import typical_gradient
from adam_ghost.optim.moments import adam_scalars
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import register


class Scalars(NamedTuple):
    t: Scalar
    lr: Scalar
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class AdamaxState(Elementwise):
    """The state: the first moment, and the largest gradient."""

    kinds = 2
    slots = (0, 1, None)

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, exp_avg: Tensor, exp_inf: Tensor) -> tuple[Value, Any, Any]:
        x = x + w * s.weight_decay
        mean = x * (1 - s.beta1) + exp_avg * s.beta1
        largest = at_least(absolute(x) + s.eps, exp_inf * s.beta2)
        return mean / largest * (s.lr / (1 - s.beta1**s.t)), mean, largest

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        found = Coefficients(SIZES.index("largest"), s.lr, s.maximize, s.weight_decay, s.beta1, 1 - s.beta1)
        return found._replace(square_v=s.beta2, eps=s.eps, adaptive=1 / (1 - s.beta1**s.t))

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        scalars = Scalars(**adam_scalars(group, held), maximize=bool(group["maximize"]))
        return scalars, (held.get("exp_avg"), held.get("exp_inf"))

    @staticmethod
    def bounded(s: Scalars, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[0], torch.maximum(state[1], share / s.beta2) if s.beta2 else state[1]

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        exp_avg, exp_inf = self._rows[p].state
        return None if exp_inf is None else typical_gradient(exp_avg, exp_inf * exp_inf)


register(torch.optim.Adamax, AdamaxState.of)
