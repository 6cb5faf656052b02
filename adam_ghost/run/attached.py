"""The runs that hang on a model: one at a time, and none that keeps its model alive or outlives its own deletion."""

import gc
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Run(Protocol):
    """What is asked of a run."""

    def parameters(self) -> list[Tensor]:
        """Of its model, while it is attached."""
        ...


# the runs that are attached to a model
_RUNS: "weakref.WeakSet[Run]" = weakref.WeakSet()


def claim(model: nn.Module, run: Run) -> None:
    """Raises ValueError if ``model``, or a part of it, has a run already; else it is ``run``'s."""
    inside = set(model.parameters())

    def taken() -> bool:
        return any(not inside.isdisjoint(other.parameters()) for other in list(_RUNS))

    if taken():
        gc.collect()  # a run that nobody holds any more may only wait for it
        if taken():
            raise ValueError(
                "the model, or a part of it, has an InRun already: close() that one first; for several validation losses, let"
                " val_loss return [K]"
            )
    _RUNS.add(run)


def weakly(method: Callable) -> Callable:
    """The bound method as a hook that does not keep its object alive."""
    ref = weakref.WeakMethod(method)

    def hook(*args: Any) -> None:
        alive = ref()
        if alive is not None:
            alive(*args)

    return hook
