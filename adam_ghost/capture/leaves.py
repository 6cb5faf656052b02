"""Leaves of what a call is given and returns, as ``torch.utils._pytree`` has them, at once where they lie bare."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

_BARE = {Tensor, nn.Parameter, bool, int, float, str, type(None)}


def leaves_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """``pytree.tree_leaves((args, kwargs))``."""
    found = [*args, *kwargs.values()]
    return found if _BARE.issuperset(map(type, found)) else pytree.tree_leaves((args, kwargs))


def leaves_of(x: Any) -> list[Any]:
    """``pytree.tree_leaves(x)``."""
    return [x] if isinstance(x, Tensor) else pytree.tree_leaves(x)
