"""A recorded call of a layer or function: replayed with other parameter values, it yields everything attribution needs.

The call's samples meet its parameters in ``outputs``; ``grad_output`` of each arrives in the backward pass. Parameters may
come through other calls that no sample entered (a position embedding, a generated weight): those are replayed along.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adam_ghost.capture.batch import Tag
from adam_ghost.capture.hooks import hook_gradient
from adam_ghost.capture.kinds import layer_kind
from adam_ghost.capture.surroundings import Surroundings


class Ref:
    """Stands in a recorded argument for output ``index`` of a call that no sample entered."""

    def __init__(self, call: "Call", index: int):
        self.call, self.index = call, index


class _Bare(nn.Module):
    """Runs a module's forward alone: a replay must not fire the hooks that users or other tools hung on it."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module.forward(*args, **kwargs)


def _wide(x: Any) -> Any:
    """Replays run in at least float32: half precision is a matter of the training pass, not of the definition."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def _place(p: Tensor) -> tuple[int, int]:
    """Differs after a change in place, and after another tensor took the data's place."""
    return p._version, p.data_ptr()


NO_GRADIENT: Mapping[int, Tensor] = MappingProxyType({})
Receive: TypeAlias = "Callable[[Call, int, Tensor], None]"
RngState = tuple[Tensor, Tensor | None, torch.device | None]


def rng_state(device: torch.device) -> RngState:
    """The random state that a call on ``device`` starts from, so that its replay draws the same dropout mask."""
    if device.type == "cuda":
        return torch.get_rng_state(), torch.cuda.get_rng_state(device), device
    return torch.get_rng_state(), None, None


class _View(NamedTuple):
    """How a tensor is seen through another one's memory."""

    base: torch.Size
    base_stride: tuple[int, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, grad: Tensor) -> Tensor:
        """What the view sees of its base's gradient."""
        if grad.stride() != self.base_stride:
            grad = torch.empty_strided(self.base, self.base_stride, dtype=grad.dtype, device=grad.device).copy_(grad)
        return grad.as_strided(self.shape, self.stride, grad.storage_offset() + self.offset)


def _seen_through(base: Tensor, out: Tensor) -> _View | torch.Size:
    """How ``out`` sees the gradient of its base, which has as many elements: in another shape alone, nearly always."""
    offset = int(out.storage_offset() - base.storage_offset())
    if offset == 0 and base.is_contiguous() and out.is_contiguous():
        return out.shape
    return _View(base.shape, base.stride(), out.shape, out.stride(), offset)


class Call:
    """One call of ``fn`` (a module or a torch function), with the tensors it was given.

    ``own`` maps a module's local parameter names to parameters; functions have their parameters among the arguments.
    ``names`` has the model's names of all its trainable parameters.
    ``rng``, ``buffers`` and ``surroundings`` are the random state, a module's buffers and what else its code may read and write,
    as the call met them, where it may change them.
    """

    def __init__(
        self,
        name: str,
        fn: Callable,
        args: tuple,
        kwargs: dict,
        own: dict[str, nn.Parameter],
        names: Mapping[Tensor, str],
        rng: RngState | None = None,
        inplace: bool = False,
        buffers: dict[str, Tensor] | None = None,
        surroundings: Surroundings | None = None,
    ):
        self.fn: Any = fn  # of a module, its own attributes are asked for
        self.name, self.own, self.rng, self.inplace = name, own, rng, inplace
        self._names = names
        self.buffers = buffers or {}  # of a module that may write them, as the call found them
        self.surroundings = surroundings
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._leaves = [x if isinstance(x, nn.Parameter) or not isinstance(x, Tensor) else x.detach() for x in self._leaves]
        self._versions = [x._version if isinstance(x, Tensor) else None for x in self._leaves]
        # of layers linear in their parameters no replay depends on the weights
        self.kind = layer_kind(fn)
        self._weights = [] if self.kind else [(p, _place(p)) for p in self._parameters()]
        self._found: dict[str, nn.Parameter] | None = None  # by ``parameters``
        self._own_names: dict[str, str] | None = None  # by ``directions``
        self.rows: int | None = None  # of the outputs of a head's definition, where the head itself may give but their sum
        self.outputs: dict[int, Tag] = {}  # which outputs carry samples, and where
        self.grad_output: Mapping[int, Tensor] = NO_GRADIENT

    def weights_move(self) -> None:
        """The parameters are elsewhere in memory whenever they are whole: that says nothing of their values."""
        self._weights = []

    def watch(self, index: int, out: Tensor, tag: Tag, inputs: Sequence[Tensor], receive: "Receive") -> Tensor:
        """Has ``receive(self, index, grad)`` called when the gradient of ``out`` comes; returns the tensor at which it will."""
        self.outputs[index] = tag
        return self.await_gradient(index, out, inputs, receive)

    def await_gradient(self, index: int, out: Tensor, inputs: Sequence[Tensor] | None, receive: "Receive") -> Tensor:
        """``watch``, where ``outputs`` tells the samples already; ``inputs`` None: nobody writes to ``out`` in place."""
        # products of more than two dimensions are views; an in-place function on them leaves their own node aside
        base = None if inputs is None else out._base
        if base is not None and (not base.requires_grad or base.numel() != out.numel()):
            base = None
        for x in inputs or ():
            if base is x or (base is not None and base is x._base):
                base = None
        if base is None:
            hook_gradient(out, partial(_arrived, self, receive, index, None))
            return out
        seen = _seen_through(base, out)
        hook_gradient(base, partial(_arrived, self, receive, index, seen))
        return base

    def _copy(self, **changed: Any) -> "Call":
        call = object.__new__(type(self))
        call.__dict__ = self.__dict__ | changed
        return call

    def with_gradient(self, index: int, grad: Tensor) -> "Call":
        """The same call, with ``grad`` at output ``index`` as its only output gradient."""
        return self._copy(grad_output={index: grad})

    def without_tensors(self) -> "Call":
        """What ``Again`` makes calls of: the same layer, nothing of this step."""
        self.parameters()
        self.directions({})
        return self._copy(_leaves=[None], _versions=[None], outputs={}, grad_output=NO_GRADIENT)

    @property
    def input(self) -> Tensor:
        """The first tensor the call was given: a layer's activations, or an embedding's indices."""
        leaves = self.arguments()
        return leaves[0] if isinstance(leaves[0], Tensor) else next(x for x in leaves if isinstance(x, Tensor))

    def arguments(self) -> list[Any]:
        """The recorded argument leaves; raises RuntimeError if one was changed in place since."""
        for x, version in zip(self._leaves, self._versions, strict=True):
            if version is not None and x._version != version and not isinstance(x, nn.Parameter):
                self._refuse_input()
        if self._weights and any(_place(p) != place for p, place in self._weights):
            raise RuntimeError(
                f"the weights of '{self.name}' changed between its forward pass and the step (SAM, another optimizer's step): its"
                " scores cannot be computed"
            )
        return self._leaves

    def _refuse_input(self) -> None:
        raise RuntimeError(f"an input of '{self.name}' was modified in place after the call: its scores cannot be computed")

    def _parameters(self) -> list[nn.Parameter]:
        """The module's parameters, trained or not, and those among the arguments."""
        own = list(self.fn.parameters()) if isinstance(self.fn, nn.Module) else []
        return own + [x for x in self._leaves if isinstance(x, nn.Parameter)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trainable parameter the outputs depend on through this call, by its name in the model."""
        if self._found is None:
            self._found = {self._names[p]: p for p in self.own.values() if p in self._names}
            for x in self._leaves:
                if isinstance(x, nn.Parameter) and x in self._names:
                    self._found[self._names[x]] = x
                elif isinstance(x, Ref):
                    self._found |= x.call.parameters()
        return self._found

    def name_of(self, p: Tensor | None) -> str | None:
        """The model's name of one of this call's parameters; None where it is not trained."""
        return None if p is None else self._names.get(p)

    def directions(self, P: Mapping[str, Tensor], *attributes: str) -> list[Tensor | None]:
        """The entries of ``P`` for the module's parameters of these names; None where there is none, or it is not trained."""
        if self._own_names is None:
            self._own_names = {key: name for key, p in self.own.items() if (name := self._names.get(p)) is not None}
        names = self._own_names
        return [P.get(names[attribute]) if attribute in names else None for attribute in attributes]

    def replay(
        self,
        values: Mapping[str, Tensor],
        others: Callable[[Tensor], Tensor] = Tensor.detach,
        data: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Any]:
        """The call's output leaves with parameters replaced by ``values``, by name, and the rest by ``others`` of them.

        ``data``: what takes the place of tensors that are not made of parameters. Without side effects, and in at least float32.
        """

        def value(p: Tensor) -> Tensor:
            name = self._names.get(p)
            return values[name] if name is not None and name in values else others(p.detach())

        leaves = []
        for x in self.arguments():
            if isinstance(x, Ref):
                x = x.call.replay(values, others)[x.index]
            elif isinstance(x, nn.Parameter):
                x = value(x)
            elif data is not None and isinstance(x, Tensor):
                x = data(x)
            leaves.append(_wide(x))
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if self.rng is not None:
                state, device_state, device = self.rng
                stack.enter_context(torch.random.fork_rng([] if device is None else [device]))
                torch.set_rng_state(state)
                if device is not None and device_state is not None:
                    torch.cuda.set_rng_state(device_state, device)
            if self.surroundings is not None:
                stack.enter_context(self.surroundings.entered())
            if isinstance(self.fn, nn.Module):
                held = {f"module.{k}": _wide(value(p)) for k, p in self.fn.named_parameters()}
                held |= {f"module.{k}": _wide(self.buffers.get(k, x).clone()) for k, x in self.fn.named_buffers()}
                out = torch.func.functional_call(_Bare(self.fn), held, args, kwargs)
            elif self.inplace:
                out = args[0].clone()
                result = self.fn(out, *args[1:], **kwargs)
                out = out if result is None else result
            else:
                out = self.fn(*args, **kwargs)
        return pytree.tree_leaves(out)


class Again(Call):
    """The call of a layer that was recorded before, with ``x`` as its only argument. Made in every step, of few objects."""

    def __init__(self, before: Call, x: Tensor, names: Mapping[Tensor, str], outputs: dict[int, Tag]):
        self.fn, self.name, self.kind, self.own, self.rows = before.fn, before.name, before.kind, before.own, before.rows
        self.rng, self.inplace, self.buffers, self.surroundings = before.rng, before.inplace, before.buffers, before.surroundings
        self._spec, self._weights, self._found, self._own_names = before._spec, before._weights, before._found, before._own_names
        self._names, self._x, self._version = names, x.detach(), x._version
        self.outputs, self.grad_output = outputs, NO_GRADIENT

    @property
    def input(self) -> Tensor:
        if self._x._version != self._version:
            self._refuse_input()
        return self._x

    def arguments(self) -> list[Any]:
        return [self.input]


def _arrived(call: Call, receive: Receive, index: int, seen: _View | torch.Size | None, grad: Tensor | None) -> None:
    # none comes for a custom function's result that nothing used; while gradients are on they are not what .grad adds up:
    # a pass for higher derivatives (create_graph=True)
    if grad is None or torch.is_grad_enabled():
        return
    if seen is not None:
        grad = seen.of(grad) if isinstance(seen, _View) else grad.reshape(seen)
    elif call.rows is not None and not grad.ndim:
        grad = grad.expand(call.rows)  # at each row of what was summed up
    receive(call, index, grad)
