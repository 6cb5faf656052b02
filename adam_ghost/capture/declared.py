"""Custom autograd functions: what they do to a batch is shown by experiment, where a user declares it; else it is unknown."""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import CheckpointFunction

# by the function that a mode is told of
DECLARED: dict[Callable, "Declared"] = {}
# whose backward pass is followed (it runs the layers again), and those declared
FOLLOWED: set[type] = {CheckpointFunction}

# that return their tensors as they are, to be told of the backward pass there
PASSING: set[type] = set()


def keeps_samples_apart(function: Any) -> Any:
    """Declares that a ``torch.autograd.Function``, or a plain function, never mixes the samples of a batch; a decorator, too.

    In forward and backward, what lies at one index of the batch's dimension depends on what lies there in the arguments
    alone, and results have the batch along the same dimension as the arguments. Otherwise such a function hides the batch:
    layers behind it are named as not attributed. The declaration is tried out once, on the arguments of the first call that
    is recorded with more than one sample along a dimension: one sample is exchanged, and the others' results and gradients
    must stay. Where the samples are in rows of any order, it is taken at its word.

    Returns the class itself; of a plain function (``torch.compile(flex_attention)``, say), the one to call in its place.
    Raises TypeError if it is neither; the call that finds the declaration false raises ValueError.
    """
    if not isinstance(function, type) and callable(function):
        return _declared(function)
    if not (isinstance(function, type) and issubclass(function, torch.autograd.Function)):
        raise TypeError(f"keeps_samples_apart expects a function or a subclass of torch.autograd.Function, got {function!r}")
    if function not in FOLLOWED:
        run = visible(function)
        DECLARED[run] = Declared(run, function.__qualname__)
        FOLLOWED.add(function)
    return function


def _declared(function: Callable) -> Callable:
    """``function`` as one that a function mode is told of, and not of what it does."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if not torch.compiler.is_compiling() and has_torch_function(tensors):
            return handle_torch_function(run, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    DECLARED[run] = Declared(run, getattr(function, "__qualname__", repr(function)))
    return run


def visible(function: type[torch.autograd.Function]) -> Callable:
    """Has a function mode told of the calls of a custom function; returns what the mode is told to be called."""
    patched: Any = function  # whose method is replaced
    bind: Any = inspect.getattr_static(function, "apply").__get__  # a class method of Python's, or from torch 2.14 on of C's

    def run(*args: Any) -> Any:
        tensors = tuple(x for x in args if isinstance(x, Tensor))
        if not torch.compiler.is_compiling() and has_torch_function(tensors):
            return handle_torch_function(run, tensors, *args)
        return bind(None, function)(*args)

    def apply(cls: type, *args: Any) -> Any:
        return run(*args) if cls is function else bind(None, cls)(*args)

    run.__name__ = f"{function.__qualname__}.apply"
    patched.apply = classmethod(apply)
    return run


# of libraries, by module and name: element by element, whatever their code
_KNOWN = (("transformers.models.bloom.modeling_bloom", "GeLUFunction"),)


def declare_known() -> None:
    """Declares the functions of libraries that are loaded and known to keep samples apart."""
    for module, name in _KNOWN:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None:
            keeps_samples_apart(function)


def custom_function(node: Any) -> type | None:
    """The custom autograd function that made a node of the graph; None for torch's own."""
    return getattr(type(node), "_forward_cls", None)


def is_opaque(node: Any) -> bool:
    """Whether a node of the graph is of a custom autograd function that is neither declared nor followed."""
    function = custom_function(node)
    return function is not None and function not in FOLLOWED


class Declared:
    """A declaration, and whether it was tried out."""

    def __init__(self, run: Callable, name: str):
        self.run, self.name, self.tried = run, name, False

    def try_out(self, args: tuple, kwargs: dict[str, Any], axes: dict[int, int], n: int) -> None:
        """``axes``: which arguments carry ``n`` samples, and along which dimension. Raises ValueError where they mix."""
        if self.tried or n < 2:
            return
        for sample in (0, n - 1):
            self._exchange(args, kwargs, axes, n, sample)
        self.tried = True

    @torch.enable_grad()
    def _exchange(self, args: tuple, kwargs: dict[str, Any], axes: dict[int, int], n: int, sample: int) -> None:
        copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        for i in axes:
            copies[i].requires_grad_(copies[i].is_floating_point())
        changed = list(copies)
        for i, axis in axes.items():
            changed[i] = copies[i].detach().clone()
            _rows(changed[i], axis, n)[sample] = _rows(copies[i].detach(), axis, n)[(sample + 1) % n]
        with torch.no_grad():
            new = self._outputs(changed, kwargs)
        outs = self._outputs([x.clone() if isinstance(x, Tensor) else x for x in copies], kwargs)
        axis = next(iter(axes.values()))
        carrying = [(a, b) for a, b in zip(outs, new, strict=True) if axis < a.ndim and a.shape[axis] % n == 0]
        for before, after in carrying:
            self._same(_rows(before.detach(), axis, n), _rows(after, axis, n), sample, "results")

        watched = [copies[i] for i in axes if copies[i].requires_grad]
        graphs = [x for x, _ in carrying if x.requires_grad]
        if not watched or not graphs:
            return
        pulls = [torch.zeros_like(x) for x in graphs]  # on one sample's results alone
        for pull in pulls:
            _rows(pull, axis, n)[sample] = 1
        grads = torch.autograd.grad(graphs, watched, pulls, allow_unused=True)
        for i, grad in zip([i for i in axes if copies[i].requires_grad], grads, strict=True):
            if grad is not None:
                rows = _rows(grad, axes[i], n)
                self._same(torch.zeros_like(rows), rows, sample, "gradients")

    def _outputs(self, args: list[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        devices = sorted({x.device.index for x in args if isinstance(x, Tensor) and x.device.type == "cuda"})
        with torch.random.fork_rng(devices):  # every run draws the same numbers
            out = self.run(*args, **kwargs)
        return [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]

    def _same(self, a: Tensor, b: Tensor, sample: int, what: str) -> None:
        """Whether all samples but one have equal rows, to the rounding of their type."""
        others = [i for i in range(len(a)) if i != sample]
        difference = (a[others] - b[others]).abs().max() if a.is_floating_point() else (a[others] != b[others]).any()
        rounding = 4 * torch.finfo(a.dtype).eps * max(a.abs().max(), b.abs().max()) if a.is_floating_point() else 0
        if a[others].numel() and bool(difference > rounding):
            raise ValueError(f"{self.name} was declared to keep samples apart, but one sample's {what} depend on another sample")


def _rows(x: Tensor, axis: int, n: int) -> Tensor:
    """A view ``[n, ...]`` of the samples along ``axis``, each with its rows."""
    return x.unflatten(axis, (n, -1)).movedim(axis, 0)
