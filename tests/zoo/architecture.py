"""What a family of the zoo is, the losses that its samples have, and the precision that it is run in."""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

N = 4  # samples
WAYS = ("midpoint", "lookahead", "window")


class Architecture(Protocol):
    """A small model, in float64, and what it is given."""

    model: str  # what its library calls it
    ways: tuple[str, ...]  # the schedules that it supports

    def build(self) -> nn.Module: ...

    def inputs(self, seed: int) -> tuple[Tensor, ...]: ...


def losses(out: Tensor) -> Tensor:
    """``[n]``: a curved loss of each sample's output."""
    rows = out.flatten(1)
    return (rows - 0.3).square().mean(1) + rows[:, 0].sin() + rows[:, -1].cos()


class InFloat64(TorchFunctionMode):
    """What models compute in float32 whatever their weights are, they compute in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = Tensor.double if func is Tensor.float else func
        return func(*map(wide, args), **{k: wide(x) for k, x in (kwargs or {}).items()})
