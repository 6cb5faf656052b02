"""Difference quotients by the rules that derivatives have: a step's definition, run on a ``Chord``, gives its exact secant.

The quotient of a function between the ends of a path is formed from its parts' quotients, as forward-mode differentiation does
with derivatives, without the difference of nearly equal numbers that subtracting its values would be. Where both ends are one
point it is the derivative there. The functions below take tensors as well, which is how the same definition is a step.
"""

from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor  # a tensor has no dimensions


class Chord:
    """A quantity at both ends of a path of the gradient, ``start`` and ``end``, and its quotient by the gradient: ``slope``."""

    __slots__ = ("end", "slope", "start")

    def __init__(self, start: Tensor, end: Tensor, slope: Tensor):
        self.start, self.end, self.slope = start, end, slope

    def __neg__(self) -> "Chord":
        return Chord(-self.start, -self.end, -self.slope)

    def __add__(self, other: "Chord | Scalar") -> "Chord":
        if isinstance(other, Chord):
            return Chord(self.start + other.start, self.end + other.end, self.slope + other.slope)
        return Chord(self.start + other, self.end + other, self.slope)

    __radd__ = __add__

    def __sub__(self, other: "Chord | Scalar") -> "Chord":
        return self + -other

    def __rsub__(self, other: Scalar) -> "Chord":
        return -self + other

    def __mul__(self, other: "Chord | Scalar") -> "Chord":
        if isinstance(other, Chord):
            slope = self.slope * other.start + self.end * other.slope
            return Chord(self.start * other.start, self.end * other.end, slope)
        return Chord(self.start * other, self.end * other, self.slope * other)

    __rmul__ = __mul__

    def __truediv__(self, other: "Chord | Scalar") -> "Chord":
        if isinstance(other, Chord):
            # divided one after another: in float32 products of small denominators underflow
            start = self.start / other.start
            return Chord(start, self.end / other.end, (self.slope - start * other.slope) / other.end)
        return Chord(self.start / other, self.end / other, self.slope / other)


# what an optimizer's definition is a function of
Value = TypeVar("Value", Tensor, Chord)


def square(x: Value) -> Value:
    if isinstance(x, Chord):
        return Chord(x.start * x.start, x.end * x.end, x.slope * (x.start + x.end))
    return x * x


def root(x: Value) -> Value:
    """The square root; where it is 0, at both ends, its slope counts as 0, that of the symmetric limit."""
    if isinstance(x, Chord):
        start, end = x.start.sqrt(), x.end.sqrt()
        both = start + end
        return Chord(start, end, torch.where(both == 0, 0.0, x.slope / torch.where(both == 0, 1.0, both)))
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def absolute(x: Value) -> Value:
    if not isinstance(x, Chord):
        return x.abs()
    start, end = x.start.abs(), x.end.abs()
    crosses = x.start.sign() * x.end.sign() < 0
    quotient = (end - start) / torch.where(crosses, x.end - x.start, 1.0)
    return Chord(start, end, x.slope * torch.where(crosses, quotient, (x.start + x.end).sign()))


def at_least(x: Value, least: Tensor) -> Value:
    """The larger of both; where they are equal the slope is ``x``'s."""
    if not isinstance(x, Chord):
        return torch.maximum(x, least)
    start, end = torch.maximum(x.start, least), torch.maximum(x.end, least)
    low, high = x.start < least, x.end < least
    part = (end - start) / torch.where(low != high, x.end - x.start, 1.0)  # of the path, above
    return Chord(start, end, x.slope * torch.where(low != high, part, torch.where(low, 0.0, 1.0)))


def sign(x: Value) -> Value:
    """Its slope is that of the jump where the path crosses zero, and 0 elsewhere."""
    if not isinstance(x, Chord):
        return x.sign()
    start, end = x.start.sign(), x.end.sign()
    jumps = start != end
    return Chord(start, end, x.slope * torch.where(jumps, (end - start) / torch.where(jumps, x.end - x.start, 1.0), 0.0))
