"""``torch.optim.Adafactor``: a matrix' second moments as an outer product of its rows' and its columns'."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar
from adam_ghost.optim.defined import Coupled
from adam_ghost.optim.history import raised
from adam_ghost.optim.protocol import number, register


class Scalars(NamedTuple):
    t: Scalar
    lr: Scalar
    beta2_decay: float
    eps1: float | None  # None: that of the parameter's dtype
    eps2: float
    d: float
    weight_decay: float
    maximize: bool


class AdafactorState(Coupled):
    """The state: running mean squares of rows and of columns, or, of a vector, of its elements."""

    kinds = 2

    @classmethod
    def blank(cls, w: Tensor) -> tuple[Tensor, ...]:
        if w.ndim < 2:
            return torch.zeros_like(w), w.new_zeros(0)
        return torch.zeros_like(w[..., :1]), torch.zeros_like(w[..., :1, :])

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        eps1 = torch.finfo(w.dtype).eps if s.eps1 is None else s.eps1
        new = s.t**s.beta2_decay
        squares = x * x
        if w.ndim > 1:
            rows = torch.lerp(rows, squares.mean(-1, keepdim=True), new)
            columns = torch.lerp(columns, squares.mean(-2, keepdim=True), new)
            variance = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
        else:
            rows = variance = torch.lerp(rows, squares, new)
        update = x * variance.clamp(min=eps1 * eps1).rsqrt()
        clipped = update / (update.norm() / (w.numel() ** 0.5 * s.d)).clamp(min=1.0)
        size = (w.norm() / w.numel() ** 0.5).clamp(min=s.eps2)
        return clipped * (size * min(s.lr, s.t**-0.5)) + w * (s.lr * s.weight_decay), rows, columns

    @staticmethod
    def bounded(s: Scalars, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        new, squares = s.t**s.beta2_decay, g * g
        if g.ndim < 2:
            return raised(state[0], squares, share, new, 1 - new), state[1]
        of_both = zip(state, (-1, -2), strict=True)
        rows, columns = (raised(x, squares.mean(dim, keepdim=True), share, new, 1 - new) for x, dim in of_both)
        return rows, columns

    @staticmethod
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None, ...]]:
        eps1, eps2 = group["eps"]
        scalars = Scalars(
            t=number(held.get("step", 0)) + 1,
            lr=number(group["lr"]),
            beta2_decay=float(group["beta2_decay"]),
            eps1=eps1,
            eps2=eps2,
            d=float(group["d"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
        )
        return scalars, (held.get("row_var", held.get("variance")), held.get("col_var"))


register(torch.optim.Adafactor, AdafactorState.of)
