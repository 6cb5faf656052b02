"""Records the layer calls of a training step: what went in, and the gradient that came back at what went out."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.capture.batch import Batch, Tag
from adam_ghost.capture.calls import Call, Ref, RngState, rng_state
from adam_ghost.capture.hooks import FunctionMode, Hook
from adam_ghost.capture.kinds import batch_axis, keeps_apart, layer_kind, output_axes
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.surroundings import Surroundings


def unseen(hook: Callable) -> Callable:
    """Runs a hook out of the function mode's sight, which would be told of every attribute of a tensor that it looks at."""

    @wraps(hook)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return run


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are recorded as one call each, by name."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{layer}.") or layer == "" for layer in layers) or isinstance(module, torch.jit.ScriptModule):
            continue
        whole = isinstance(module, nn.MultiheadAttention) or is_parametrized(module)
        leaf = not any(True for _ in module.children())
        if (whole or leaf) and any(p.requires_grad for p in module.parameters()):
            layers[name] = module
    return layers


_TENSOR_PROPERTIES = {getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real", "imag")}


# functions that take but the shape or type of the tensors after the first
_LIKE = {"expand_as", "view_as", "reshape_as", "type_as", "to"}


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _writes(name: str) -> bool:
    """Whether the function of this name changes its first argument in place."""
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensor arguments of a torch function, inside lists and tuples too."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


class Recorder:
    """The hooks on a model's layers, and the function mode that follows the batch between them.

    Hooks fire from ``attach`` to ``detach``, and record between ``begin`` and ``end``. Checkpointed layers run again in
    the backward pass, after ``end``: these are recorded as long as ``recording`` is set.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.mode = FunctionMode(self._follow)
        self.recording: Recording | None = None
        self.open = False
        self.handles: list[Any] = []
        self.names: dict[Tensor, str] = {}  # of the parameters that are trained now
        self._reset()

    def attach(self) -> None:
        model = self.model
        layers = _layers(model)
        for name, module in layers.items():
            leave = partial(self._leave_layer, name or type(module).__name__)
            self.handles += [
                module.register_forward_pre_hook(Hook(self._enter_layer), with_kwargs=True),
                module.register_forward_hook(Hook(leave), with_kwargs=True, prepend=True),
                module.register_forward_hook(Hook(self._close_layer), always_call=True),
            ]
        for name, module in model.named_modules():
            part = any(name == layer or name.startswith(f"{layer}.") or layer == "" for layer in layers)
            if not part and not isinstance(module, torch.jit.ScriptModule):
                self.handles += [
                    module.register_forward_pre_hook(Hook(self._enter_model), with_kwargs=True),
                    module.register_forward_hook(Hook(self._leave_model), prepend=True),
                    module.register_forward_hook(Hook(self._close_model), always_call=True),
                ]

    def detach(self) -> None:
        self.end()
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _reset(self) -> None:
        self.batch = Batch()
        self.sources = WeakIdKeyDictionary()  # tensors made of parameters without samples, each with its Ref
        self.inner = WeakIdKeyDictionary()  # the same, within the layer now running
        self.entries: dict[tuple[nn.Module, int], set[Tag]] = {}  # where the batch was in a layer's i-th argument
        self.follow = False  # whether the layer now running is followed function by function
        self.buffers: dict[str, Tensor] = {}
        self.surroundings: Surroundings | None = None
        self.inside_model = self.inside_layer = 0
        self.rng: RngState | None = None
        self.scored = False  # whether the layer now running takes care of its own scores

    def begin(self, recording: Recording) -> None:
        self._reset()
        self.recording = recording
        self.names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        self.open = True
        self.mode.__enter__()

    def end(self) -> None:
        """Records no longer; also after a forward pass that an interrupt (Ctrl-C) broke off, which no hook is told of."""
        self.open = False
        self.mode.remove()

    @property
    def in_forward(self) -> bool:
        return self.open and not _in_backward()

    @property
    def active(self) -> bool:
        return self.open or (self.recording is not None and _in_backward())

    # the model as a whole, or a part that is called on its own: its arguments are the batch

    @unseen
    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.in_forward:
            return
        self.inside_model += 1
        if self.inside_model == 1:
            new = self._untagged(pytree.tree_leaves((args, kwargs)))
            if new and module is self.model and self.batch.n not in (None, new[0].shape[0]):
                raise ValueError(
                    f"the model was called with batches of {self.batch.n} and {new[0].shape[0]} samples within one `with cache`"
                )
            self._tag_by_size(new)

    @unseen
    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.in_forward or self.inside_model > 1:
            return
        for x in pytree.tree_leaves(output):
            # made by ways that carry no tags (through numpy, say): exact all the same, as one long replay
            if isinstance(x, Tensor) and x in self.sources and x.ndim and x.shape[0] == self.batch.n:
                call = Call("output", Tensor.clone, (self.sources[x],), {}, {}, self.names)
                self._watch(call, 0, x, (0, 1))

    def _close_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_model -= self.in_forward

    def _untagged(self, leaves: list[Any]) -> list[Tensor]:
        return [x for x in leaves if isinstance(x, Tensor) and x.ndim and x not in self.batch and not self._is_source(x)]

    def _tag_by_size(self, tensors: list[Tensor]) -> None:
        if tensors and self.batch.n is None:
            self.batch.n = self.recording.batch_size = tensors[0].shape[0]
        for x in tensors:
            self.batch.tag(x, (0, 1))

    def _is_source(self, x: Tensor) -> bool:
        return x.requires_grad and (x in self.names or x in self.sources or x in self.inner)

    # layers

    @unseen
    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.active:
            return
        self.inside_layer += 1
        leaves = pytree.tree_leaves((args, kwargs))
        new = self._untagged(leaves)
        if _in_backward():
            self._tag_again(module, leaves, new)
        elif self.inside_model:
            # the batch is followed from the model's arguments; a tensor with a graph but no tag took a way unseen
            for x in new:
                if x.requires_grad:
                    self.batch.tag_unseen(x)
        else:
            self._tag_by_size(new)
        if self.in_forward:
            for i, x in enumerate(leaves):
                if isinstance(x, Tensor) and self.batch[x]:
                    self.entries.setdefault((module, i), set()).add(self.batch[x])
        self.rng, self.buffers, self.surroundings, self.follow = None, {}, None, False
        if layer_kind(module) is None:
            self.rng = rng_state(next(module.parameters()).device)
            if module.training:
                self.buffers = {k: x.clone() for k, x in module.named_buffers()}
            # what torch.nn does to the batch is known; any other code is followed
            self.follow = not type(module).__module__.startswith("torch.nn.")
            if self.follow:
                self.surroundings = Surroundings(module.modules())
            self.inner = WeakIdKeyDictionary()

    def _tag_again(self, module: nn.Module, leaves: list[Any], new: list[Tensor]) -> None:
        """A checkpoint's recomputation, with functions out of sight: the batch is where it was when the checkpoint first ran."""
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad and any(x is y for y in new):
                tags = [tag for tag in self.entries.get((module, i), ()) if self.batch.fits(x, tag)]
                if tags:
                    self.batch.tag(x, tags[0] if len(tags) == 1 else None)
                else:
                    self.batch.tag_unseen(x)

    def _close_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_layer -= self.active
        self.scored = False

    @unseen
    def _leave_layer(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self.active or self.batch.n is None:
            return
        outs = pytree.tree_leaves(output)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        first = next((x for x in tensors if self.batch[x]), None)
        tag = None if first is None else self.batch[first]
        if tag is not None and tag[0] != batch_axis(module, tag[0]):
            raise ValueError(f"'{name}' ({type(module).__name__}) has batch_first=False, but its batch is dimension {tag[0]}")
        if self.scored:
            self.batch.tag(output, tag)
            return

        def place(i: int, out: Tensor) -> Tag | None:
            if out in self.batch:
                return self.batch[out]
            if tag is None or not keeps_apart(module, first, tag[0]):
                return None
            size = self.batch.n * tag[1]
            axes = [x for x in output_axes(module, i, tag[0]) if x < out.ndim and out.shape[x] == size]
            return (axes[0], tag[1]) if axes else None

        whole = layer_kind(module) is None
        own = {k: p for k, p in module.named_parameters(recurse=whole) if p.requires_grad}
        call = Call(name, module, *self._recorded(args, kwargs), own, self.names, self.rng, False, self.buffers, self.surroundings)
        if any(isinstance(x, Tensor) and x.requires_grad for x in vars(module).values()):
            self._give_up(call)  # a weight that some hook computes and leaves on the module: no replay reaches its parameters
        self._classify(call, tensors, outs, place)

    # torch functions outside of layers

    def _follow(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is Tensor.__iter__ and not self.inside_layer:
            with self.mode:
                return iter(args[0].unbind(0))
        if (self.inside_layer and not self.follow) or self.batch.n is None:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__" and func not in _TENSOR_PROPERTIES:
            return func(*args, **kwargs)
        tensors = _tensors(args[:1] if name in _LIKE else args, kwargs)
        batched = any(x in self.batch for x in tensors)
        meets_parameters = torch.is_grad_enabled() and any(self._is_source(x) for x in tensors)
        if not batched and not meets_parameters:
            return func(*args, **kwargs)

        call = None
        if meets_parameters and not self.inside_layer:
            inplace = _writes(name)
            first = args[0].detach().clone() if inplace and not self._is_source(args[0]) else None
            rng = rng_state(tensors[0].device)
            recorded_args, recorded_kwargs = self._recorded(args, kwargs)
            if first is not None:
                recorded_args = (first, *recorded_args[1:])
            call = Call(name, func, recorded_args, recorded_kwargs, {}, self.names, rng=rng, inplace=inplace)
        tagged = any(self.batch[x] for x in tensors)
        out = func(*args, **kwargs)
        outs = pytree.tree_leaves(args[0] if out is None else out)

        def place(i: int, x: Tensor) -> Tag | None:
            return self.batch.infer(func, args, kwargs, tensors, x) if tagged else None

        if call is not None:
            self._classify(call, tensors, outs, place)
        else:
            for i, x in enumerate(outs):
                if isinstance(x, Tensor) and batched:
                    self.batch.tag(x, place(i, x))
                    self.inner.pop(x, None)
                elif isinstance(x, Tensor) and x.requires_grad and all(self._is_source(t) for t in tensors if t.requires_grad):
                    self.inner[x] = True
        if batched and _writes(name) and args[0]._base is not None and args[0]._base in self.sources:
            self._lose(args[0]._base)  # samples were written into it through a view
        return out

    # what becomes of a call

    def _recorded(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with every tensor made of parameters alone replaced by the call that made it."""
        return pytree.tree_map(
            lambda x: self.sources[x] if isinstance(x, Tensor) and x.requires_grad and x in self.sources else x, (args, kwargs)
        )

    def _classify(self, call: Call, tensors: list[Tensor], outs: list[Any], place: Callable[[int, Tensor], Tag | None]) -> None:
        """Samples met parameters: the outputs are watched. Parameters alone: they are sources. What is lost is given up."""
        outs = [(i, x) for i, x in enumerate(outs) if isinstance(x, Tensor)]
        if any(self.batch.lost(x) for x in tensors):
            # a penalty added to the loss takes nothing from what the samples' calls explain of its parameters
            if self.inside_model or any(x.ndim for x in tensors if self.batch.lost(x)):
                self._give_up(call)
            for _, x in outs:
                self._lose(x)
        elif any(self.batch[x] for x in tensors):
            for i, x in outs:
                if x in self.inner and x not in self.batch:
                    self.sources[x] = Ref(call, i)
                else:
                    self._watch(call, i, x, place(i, x))
        elif any(x.requires_grad and not self._is_source(x) for x in tensors):
            self._give_up(call)
        elif torch.is_grad_enabled():
            for i, x in outs:
                if x.requires_grad:
                    self.sources[x] = Ref(call, i)

    def _watch(self, call: Call, index: int, out: Tensor, tag: Tag | None) -> None:
        self.batch.tag(out, tag)
        self.sources.pop(out, None)
        if out.requires_grad and tag is None:
            self._give_up(call)
        elif out.requires_grad:
            call.watch(index, out, tag, self.recording.receive)
            if self.recording.outputs is not None:
                self.recording.outputs.append(out)

    def _lose(self, x: Tensor) -> None:
        self.sources.pop(x, None)
        self.batch.tag(x, None)

    def _give_up(self, call: Call) -> None:
        self.recording.unattributed.update(call.parameters())
