"""What one forward and backward pass leaves behind: layer calls, each with its output gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from adam_ghost.capture.calls import NO_GRADIENT, Call
from adam_ghost.capture.rows import Packing


class Recording:
    """What was recorded of one forward and backward pass over ``batch_size`` rows; a row is a sample unless ``packing`` says."""

    def __init__(self, packing: Packing | None = None):
        self.packing = packing
        self.calls: list[Call] = []
        self.batch_size = 0  # until the batch has been seen
        self.unattributed: set[str] = set()  # parameters used where no sample can be told apart
        self.doubts: list[Tensor] = []  # [] bool each: whether rows of different samples met where nobody could look
        self.outputs: list[GradientEdge] | None = None  # if a list, it takes the places where gradients are awaited
        self.beyond = False  # whether what is done with the model's outputs is followed, too
        self.deviation = ""  # what was unlike in earlier steps, where that leaves this one without scores
        self.on_arrival: Callable[[], None] | None = None  # told in the midst of every backward pass that brings a gradient
        self._pass = -1  # the last one that did

    def awaits(self, x: Tensor) -> None:
        """The gradient of ``x`` is awaited."""
        if self.outputs is not None:
            self.outputs.append(get_gradient_edge(x))

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        """The gradient at output ``index`` of ``call`` has come; several backward passes add up, as they do in ``.grad``."""
        self.comes()
        if not call.grad_output:
            self.calls.append(call)
        before = call.grad_output.get(index)
        call.grad_output = {**call.grad_output, index: grad if before is None else before + grad}

    def comes(self) -> None:
        """A gradient comes."""
        now = torch._C._current_graph_task_id()
        if now != self._pass:
            self._pass = now
            self._begins()

    def _begins(self) -> None:
        """It is the first one in this backward pass."""
        if self.on_arrival is not None:
            self.on_arrival()

    def doubted(self, scores: Tensor) -> Tensor:
        """``scores``; not finite where rows turn out to be of other samples than was taken for granted."""
        if not self.doubts:
            return scores
        return torch.where(torch.stack(self.doubts).any(), float("nan"), scores)

    def forget(self) -> None:
        """The gradients that have come count no more; others may come, by another backward pass."""
        for call in self.calls:
            call.grad_output = NO_GRADIENT
        self.calls = []

    def touched(self) -> set[str]:
        """The names of the parameters of whose gradient the recorded calls explain a part, or all."""
        return set().union(*(call.parameters() for call in self.calls))

    def covered(self) -> set[str]:
        """The names of the parameters whose gradient the recorded calls explain."""
        return self.touched() - self.unattributed
