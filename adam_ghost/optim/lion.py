"""Lion: the sign of a mean of gradients (arXiv 2302.06675), as lion-pytorch steps, and bitsandbytes."""

from typing import Any, NamedTuple

from torch import Tensor

from adam_ghost.optim.chord import Scalar, Value, sign
from adam_ghost.optim.defined import Elementwise, Row
from adam_ghost.optim.one_pass import SIZES, Coefficients
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    lr: Scalar
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool = False


class LionState(Elementwise):
    """The state is the running mean of gradients. The secant sees the sign jump where the gradient turns it."""

    kinds = 1
    slots = (0, None, None)
    not_carried: str | None = "Lion steps by a sign, whose derivative is zero"
    not_foreseen: str | None = "Lion steps by a sign, and which signs a gradient turns is not known before it is there"

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Value, exp_avg: Tensor) -> tuple[Value, Any]:
        by = sign(x * (1 - s.beta1) + exp_avg * s.beta1)
        return by * s.lr + w * (s.lr * s.weight_decay), x * (1 - s.beta2) + exp_avg * s.beta2

    @staticmethod
    def coefficients(s: Scalars) -> Coefficients:
        decay = s.lr * s.weight_decay
        return Coefficients(SIZES.index("sign"), s.lr, s.maximize, 0.0, s.beta1, 1 - s.beta1, decay=decay)


def _read(optimizer: Any) -> LionState:
    rows = []
    for group in optimizer.param_groups:
        decay = group["weight_decay"] / optimizer._init_lr if optimizer.decoupled_wd else group["weight_decay"]
        beta1, beta2 = map(float, group["betas"])
        scalars = Scalars(number(group["lr"]), beta1, beta2, float(decay))
        rows += [Row(p, scalars, (optimizer.state.get(p, {}).get("exp_avg"),)) for p in group["params"]]
    return LionState(rows)


register("lion_pytorch.lion_pytorch.Lion", _read)
