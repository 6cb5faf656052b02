"""Whatever a training loop steps with, read as one state."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from adam_ghost.optim.protocol import OptState, read_one
from adam_ghost.optim.several import Several

# what trains a model: an optimizer, or several that share the parameters out
Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


def read_optimizer(opt_state: Optimizers | OptState | Sequence[OptState], name: str = "opt_state") -> OptState:
    """The state of the optimizer, or of the optimizers, about to step; an ``OptState`` is returned as it is.

    Raises TypeError for an optimizer that nobody registered, also for subclasses that step differently; ValueError where there
    is none, or two hold the same parameter.
    """
    if not isinstance(opt_state, (list, tuple)):
        return read_one(opt_state, name)
    if not opt_state:
        raise ValueError(f"{name} must be an optimizer or a list of them, got an empty one")
    states = [read_one(each, f"{name}[{i}]") for i, each in enumerate(opt_state)]
    try:
        return states[0] if len(states) == 1 else Several(states)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def listed(optimizer: Any) -> list[Any]:
    """One optimizer, or several, as a list."""
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]


def settings(optimizers: Optimizers) -> list[dict[str, Any]]:
    """What each group says of the next step beside its parameters; of a tensor where it is and how often it was written to, for
    which no device is waited.
    """
    groups = [group for each in listed(optimizers) for group in each.param_groups]
    told = lambda x: (x.data_ptr(), x._version) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return [{name: told(x) for name, x in group.items() if name != "params"} for group in groups]
