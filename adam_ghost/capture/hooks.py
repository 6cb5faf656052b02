"""What hangs on a user's model, and on torch, while layer calls are recorded; copies of the model carry none of it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _get_current_function_mode_stack, _pop_mode, _push_mode


class Hook(partial):
    """A module's hook. Where the module is copied or pickled, the copy's does nothing, and holds nothing of ours."""

    def __reduce__(self) -> tuple:
        # of the standard library, so that a pickled model loads where this package is not: takes anything, returns None
        return getattr, (nullcontext(), "__exit__")


class StandIn:
    """Runs in place of a layer's ``forward``. A copy of the layer runs the forward of its class."""

    def __init__(self, layer: nn.Module, forward: Callable[[Tensor], Tensor]):
        self.layer, self._forward = layer, forward

    def attach(self) -> None:
        self.layer.forward = self

    def detach(self) -> None:
        # whoever has replaced the layer's forward since keeps his own
        own = vars(self.layer)
        if own.get("forward") is self:
            del own["forward"]

    def __call__(self, input: Tensor) -> Tensor:  # as torch.nn's layers name it
        return self._forward(input)

    def __reduce__(self) -> tuple:
        return getattr, (self.layer, "forward")  # of the copy, which has no attributes of its own yet


class Told(StandIn):
    """Runs the forward that a layer has when this is attached, and tells ``tell(layer, args, kwargs, output)``.

    A third of the time of a forward hook, and none where it is not attached.
    """

    def __init__(self, layer: nn.Module, tell: Callable[[nn.Module, tuple, dict, Any], None]):
        self.layer, self._tell = layer, tell
        self._forward: Callable = _nothing
        self._before: Any = None  # the layer's own attribute, if it had one

    def attach(self) -> None:
        own = vars(self.layer)
        self._before, self._forward = own.get("forward"), self.layer.forward
        own["forward"] = self

    def detach(self) -> None:
        super().detach()
        if self._before is not None:
            vars(self.layer).setdefault("forward", self._before)
        self._before, self._forward = None, _nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_compiling()
        output = self._forward(*args, **kwargs)
        self._tell(self.layer, args, kwargs, output)
        return output


def refuse_compiling() -> None:
    """Raises RuntimeError where torch.compile takes up code in which layers are recorded: compiled, they tell nothing."""
    if torch.compiler.is_compiling():
        _refuse_compiled()


@_disable_dynamo  # traced, the error would send the code to run uncompiled; torch.compiler.disable loads the compiler on import
def _refuse_compiled() -> None:
    raise RuntimeError(
        "the model, a part of it or a function that calls it is compiled, unlike when it was given: its layer calls cannot be"
        " recorded; compile the model first and give InRun what torch.compile(model) returns, or compile nothing"
    )


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Hooks(dict):
    """As torch keeps a tensor's hooks, which handles of others refer to weakly, in half of an ``OrderedDict``'s time."""


def hook_gradient(x: Tensor, hook: Callable[[Tensor], None]) -> None:
    """``x.register_hook(hook)`` for good: without the handle to remove it, half of the time."""
    if x._backward_hooks is not None or x.grad_fn is None:
        x.register_hook(hook)
        return
    x._backward_hooks = _Hooks(((-1, hook),))  # handles count from 0
    x.grad_fn._register_hook_dict(x)


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``module`` runs another forward than its class's; a stand-in, which computes the same, is none."""
    forward = vars(module).get("forward")
    if forward is None or isinstance(forward, StandIn):
        return False
    return not (isinstance(forward, MethodType) and forward.__func__ is getattr(type(module), "forward", None))


class FunctionMode(TorchFunctionMode):
    """While on torch's stack, has every call of a torch function made by ``call(func, args, kwargs)``."""

    def __init__(self, call: Callable[[Callable, tuple, dict], Any]):
        super().__init__()
        self._call = call

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.compiler.is_compiling():  # a function that compiles a part of itself (flex_attention) traces the mode as well
            return func(*args, **(kwargs or {}))
        return self._call(func, args, kwargs or {})

    def remove(self) -> None:
        """Takes the mode off the stack, also from under others: an interrupt in a forward pass leaves it where it was."""
        if _get_current_function_mode() is self:
            _pop_mode()
        stack = _get_current_function_mode_stack()
        if self in stack:
            above = stack[stack.index(self) + 1 :]
            for _ in range(len(above) + 1):
                _pop_mode()
            for mode in above:
                _push_mode(mode)
