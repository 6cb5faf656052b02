"""Muon: a matrix' momentum, orthogonalized by Newton-Schulz iterations. ``torch.optim.Muon``, and rows for others of its kind.

Source: kellerjordan.github.io/posts/muon. The iterations run in bfloat16; the step's derivatives are those of the same
polynomials in the weights' precision.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.chord import Scalar
from adam_ghost.optim.defined import Coupled
from adam_ghost.optim.protocol import number, register

COEFFICIENTS = (3.4445, -4.775, 2.0315)


class Scalars(NamedTuple):
    lr: Scalar
    momentum: float
    weight_decay: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    iterations: int
    eps: float
    adjust: str | None  # of lr, by the matrix' shape: as in torch.optim.Muon
    maximize: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the iterations


class MuonState(Coupled):
    """The state is the running mean of gradients."""

    kinds = 1

    @staticmethod
    def moved(s: Scalars, w: Tensor, x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        mean = torch.lerp(buffer, x, 1 - s.momentum)
        update = torch.lerp(x, mean, s.momentum) if s.nesterov else mean
        found = orthogonalized(update.to(s.dtype), s.coefficients, s.iterations, s.eps)
        return found.to(w.dtype) * (s.lr * ratio(s.adjust, w.shape)) + w * (s.lr * s.weight_decay), mean

    @classmethod
    def smooth(cls, s: Scalars, w: Tensor, x: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        return cls.moved(s._replace(dtype=w.dtype), w, x, *state)

    @staticmethod  # what a group does not say is as in torch.optim.Muon
    def read(group: Any, held: Any) -> tuple[Scalars, tuple[Tensor | None]]:
        scalars = Scalars(
            lr=number(group["lr"]),
            momentum=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=bool(group.get("nesterov", True)),
            coefficients=tuple(group.get("ns_coefficients", COEFFICIENTS)),
            iterations=int(group.get("ns_steps", 5)),
            eps=float(group.get("eps", 1e-7)),
            adjust=group.get("adjust_lr_fn"),
        )
        return scalars, (held.get("momentum_buffer"),)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        (buffer,) = self._rows[p].state
        return None if buffer is None else buffer.clone()


def orthogonalized(x: Tensor, coefficients: tuple[float, float, float], iterations: int, eps: float) -> Tensor:
    """Singular values near 1 in place of a matrix' own, ``[rows, columns]``: odd polynomials of it, in its dtype."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def ratio(kind: str | None, shape: torch.Size) -> float:
    """By what ``torch.optim.Muon`` multiplies its learning rate for a matrix of this shape."""
    rows, columns = shape
    if kind in (None, "original"):
        return math.sqrt(max(1, rows / columns))
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if kind == "spectral_unclamped":  # from torch 2.15 on
        return math.sqrt(rows / columns)
    raise ValueError(f"Muon's adjust_lr_fn={kind!r} is not known: original, match_rms_adamw or spectral_unclamped")


register(torch.optim.Muon, MuonState.of)
