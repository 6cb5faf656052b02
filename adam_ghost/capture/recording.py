"""What one forward and backward pass leaves behind: layer calls, each with its output gradient."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from adam_ghost.capture.calls import Call
from adam_ghost.capture.rows import NOBODY


class Packing(NamedTuple):
    """Samples packed in rows: sample ``i`` is the tokens ``offsets[i]:offsets[i + 1]`` of all rows in a line, or in ``order``."""

    offsets: Tensor  # [n + 1], on the batch's device
    tokens: int  # of the rows, or where the last sample ends, known to the host
    order: Tensor | None = None  # [tokens], of the tokens, in which the samples lie in a line; None: they do
    of: Tensor | None = None  # [tokens], the sample of each where ``order`` is given

    @classmethod
    def by_index(cls, of: Tensor, n: int) -> "Packing":
        """Of rows of tokens whose samples ``of`` tells, ``NOBODY``'s where they are padding."""
        of = of.flatten()
        line, order = torch.sort(torch.where(of == NOBODY, n, of), stable=True)
        return cls(torch.searchsorted(line, torch.arange(n + 1, device=of.device)), len(of), order, of)

    @property
    def samples(self) -> int:
        return len(self.offsets) - 1

    def sample_of(self, token: Tensor) -> Tensor:
        """The samples of tokens, by their places in the line of all rows; ``NOBODY``'s where they are behind the last one."""
        if self.of is not None:
            return torch.where(token == NOBODY, NOBODY, self.of[token.clamp(min=0)])
        found = torch.searchsorted(self.offsets, token, right=True) - 1
        return torch.where((token == NOBODY) | (found >= self.samples), NOBODY, found)


def find_packing(offsets: Tensor | None, samples: Tensor | None, device: torch.device, n: int | None = None) -> Packing | None:
    """How ``n`` samples are packed in rows, as the user tells; None where a row is a sample.

    Raises ValueError where both are told, or one of another shape or type.
    """
    given = offsets if samples is None else samples
    if given is None:
        return None
    name = "offsets" if samples is None else "samples"
    if offsets is not None and samples is not None:
        raise ValueError("samples packed in rows are told by offsets or by samples, got both")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {given.dtype}")
    moved = given.to(device, torch.int64, non_blocking=True)
    if samples is not None:
        n = int(given.max()) + 1 if n is None else n
        # elsewhere, looking would wait for the device
        if given.device.type == "cpu" and given.numel() and not -1 <= int(given.min()) <= int(given.max()) < n:
            raise ValueError(f"samples must be -1 to {n - 1}, got {int(given.min())} to {int(given.max())}")
        return Packing.by_index(moved, n)
    if given.ndim != 1 or len(given) < 2 or (n is not None and len(given) != n + 1):
        size, count = ("n + 1", "n") if n is None else (n + 1, n)
        raise ValueError(f"offsets must be [{size}] integers for {count} samples, got {list(given.shape)}")
    return Packing(moved, int(given[-1]))


class Recording:
    """What was recorded of one forward and backward pass over ``batch_size`` rows; a row is a sample unless ``packing`` says."""

    def __init__(self, packing: Packing | None = None):
        self.packing = packing
        self.calls: list[Call] = []
        self.batch_size = 0  # until the batch has been seen
        self.unattributed: set[str] = set()  # parameters used where no sample can be told apart
        self.doubts: list[Tensor] = []  # [] bool each: whether rows of different samples met where nobody could look
        self.outputs: list[GradientEdge] | None = None  # if a list, it takes the places where gradients are awaited
        self.deviation = ""  # what was unlike in earlier steps, where that leaves this one without scores
        self.on_arrival: Callable[[], None] | None = None  # told of every gradient, in the midst of the backward pass

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        """The gradient at output ``index`` of ``call`` has come; several backward passes add up, as they do in ``.grad``."""
        if torch.is_grad_enabled():
            return  # a pass for higher derivatives (create_graph=True): its gradients are not what .grad adds up
        if self.on_arrival is not None:
            self.on_arrival()
        if not call.grad_output:
            self.calls.append(call)
        call.grad_output[index] = call.grad_output[index] + grad if index in call.grad_output else grad

    def doubted(self, scores: Tensor) -> Tensor:
        """``scores``; not finite where rows turn out to be of other samples than was taken for granted."""
        if not self.doubts:
            return scores
        return torch.where(torch.stack(self.doubts).any(), float("nan"), scores)

    def forget(self) -> None:
        """The gradients that have come count no more; others may come, by another backward pass."""
        for call in self.calls:
            call.grad_output = {}
        self.calls = []

    def touched(self) -> set[str]:
        """The names of the parameters of whose gradient the recorded calls explain a part, or all."""
        return {name for call in self.calls for name in call.parameters()}

    def covered(self) -> set[str]:
        """The names of the parameters whose gradient the recorded calls explain."""
        return self.touched() - self.unattributed
