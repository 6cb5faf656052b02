"""Schedule-free AdamW (arXiv 2405.15682), as the package ``schedulefree`` steps.

Its weights while training are those that gradients are taken at, and so are those that a validation gradient is taken at; the
averaged ones, which ``optimizer.eval()`` puts in their place, follow from them.
"""

from typing import Any, NamedTuple

from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, root, square
from adam_ghost.optim.defined import Row
from adam_ghost.optim.history import typical_gradient
from adam_ghost.optim.moments import Moments
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    t: Scalar
    lr: float  # warmed up
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    share: float  # of the newest point in the average
    maximize: bool = False


class ScheduleFreeState(Moments):
    """The state: the base sequence ``z``, and the second moment."""

    slots = (None, 1, 0)

    @classmethod
    def blank(cls, w: Tensor) -> tuple[Tensor, ...]:
        return w, w.new_zeros(w.shape)

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, z: Tensor, exp_avg_sq: Tensor) -> tuple[Value, Any, Any]:
        squares = square(x) * (1 - s.beta2) + exp_avg_sq * s.beta2
        by = (x / (root(squares / (1 - s.beta2**s.t)) + s.eps) + w * s.weight_decay) * s.lr
        return by * (1 - s.beta1 * (1 - s.share)) + (w - z) * s.share, z - by, squares

    @staticmethod
    def held(row: Row, i: int) -> Tensor | None:
        return row.param.detach() if row.state[i] is None and i == 0 else row.state[i]  # z begins at the weights

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        adaptive = 1 - s.beta1 * (1 - s.share)
        found = Coefficients(SIZES.index("root"), s.lr, s.maximize, eps=s.eps, adaptive=adaptive, third=-s.share, third_w=1.0)
        root = (1 - s.beta2**s.t) ** -0.5
        return found._replace(square_v=s.beta2, square_x=1 - s.beta2, root=root, decay=adaptive * s.lr * s.weight_decay)

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        k, warm_up, lr = group["k"], group["warmup_steps"], float(number(group["lr"]))
        lr *= (k + 1) / warm_up if k < warm_up else 1.0
        weight = (k + 1) ** group["r"] * max(lr, group["lr_max"]) ** group["weight_lr_power"]
        total = group["weight_sum"] + weight
        scalars = Scalars(
            t=k + 1,
            lr=lr,
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            share=weight / total if total else 0.0,
        )
        return scalars, (held.get("z"), held.get("exp_avg_sq"))

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s, (_, exp_avg_sq) = self._rows[p].scalars, self._rows[p].state
        return None if exp_avg_sq is None else typical_gradient(None, exp_avg_sq / (1 - s.beta2 ** (s.t - 1)))


# which divides the gradients, in place, inside its step
register("schedulefree.adamw_schedulefree.AdamWScheduleFree", ScheduleFreeState.of, edits_gradients=True)
