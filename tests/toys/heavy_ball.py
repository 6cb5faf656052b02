"""An optimizer of one's own, and how somebody would add it: one file, one line of registration."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import adam_ghost.optim
from adam_ghost.optim.protocol import Adjoint, Linearized


class Scalars(NamedTuple):
    lr: float
    momentum: float
    weight_decay: float


class Row(NamedTuple):
    param: Tensor
    buffer: Tensor  # zeros before the first step
    scalars: Scalars


class HeavyBall(torch.optim.Optimizer):
    """Polyak's momentum with decay."""

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad).add_(p, alpha=group["weight_decay"])
                p.sub_(group["lr"] * buffer)


class HeavyBallState:
    """``buffer <- momentum * buffer + g + weight_decay * w;  w <- w - lr * buffer``: linear in the gradient."""

    linearizations = ("exact",)
    not_carried = not_foreseen = None

    def __init__(self, rows: Sequence[Row]):
        self.rows = {row.param: row for row in rows}

    @classmethod
    def of(cls, optimizer: HeavyBall) -> "HeavyBallState":
        rows = []
        for group in optimizer.param_groups:
            scalars = Scalars(group["lr"], group["momentum"], group["weight_decay"])
            for p in group["params"]:
                buffer = optimizer.state[p].get("momentum_buffer") if p in optimizer.state else None
                rows.append(Row(p, torch.zeros_like(p) if buffer is None else buffer, scalars))
        return cls(rows)

    def __contains__(self, p):
        return p in self.rows

    def parameters(self):
        return iter(self.rows)

    def weights(self, p, g):
        _, buffer, (lr, momentum, decay) = self.rows[p]
        return p.detach() - lr * (momentum * buffer + g + decay * p.detach())

    def weight_points(self, params, grads, *, empty=None, mid=None):
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            g = torch.zeros_like(p) if g is None else g
            points = self.weights(p, torch.zeros_like(p)), self.weights(p, g / 2)
            for out, point in zip((empty, mid), points, strict=True):
                if out is not None:
                    out[i].data.copy_(point)

    def linearize(self, params, grads, val_grads, rule, out):
        total = history = 0.0
        for p, g, val, P in zip(params, grads, val_grads, out, strict=True):
            rows = val.reshape(-1, p.numel())  # [K, numel]
            w_empty = self.weights(p, torch.zeros_like(p))
            history = history + rows @ (p.detach() - w_empty).flatten()
            P.copy_(self.rows[p].scalars.lr * val)
            if g is not None:
                total = total + P.reshape(-1, p.numel()) @ g.flatten()
        return Linearized(out, history, total)

    def metric(self, p, g):
        return torch.full_like(p, self.rows[p].scalars.lr)

    def expected_gradient(self, p):
        _, buffer, scalars = self.rows[p]
        return buffer * (1 - scalars.momentum)

    def steps_taken(self, default):
        return default

    def scalars(self, params):
        return [self.rows[p].scalars for p in params]

    def kept(self, params):
        return HeavyBallState([Row(p.detach().clone(), *(self.rows[p].buffer.clone(), self.rows[p].scalars)) for p in params])

    def advanced(self, grads, scalars):
        after = []
        for (p, buffer, (lr, momentum, decay)), g, then in zip(self.rows.values(), grads, scalars, strict=True):
            buffer = momentum * buffer + g + decay * p
            after.append(Row(p - lr * buffer, buffer, then))
        return HeavyBallState(after)

    def adjoint(self, val_grads):
        return Adjoint(list(val_grads), [[torch.zeros_like(x) for x in val_grads]])

    def pull(self, grads, after, shares=None):
        found = []
        (buffers,) = after.state
        for (_, _, (lr, momentum, decay)), w, b in zip(self.rows.values(), after.weights, buffers, strict=True):
            through = b - lr * w  # what the buffer after the step is worth
            found.append(through)
            w += decay * through
            b.copy_(momentum * through)
        return found


adam_ghost.optim.register(HeavyBall, HeavyBallState.of)
