"""Records the layer calls of a training step: what went in, and the gradient that came back at what went out."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.batching import Batch, Tag
from adam_ghost.calls import Call, Ref, RngState, rng_state
from adam_ghost.layers import layer_kind


class Recording:
    """What was recorded of one forward and backward pass over ``batch_size`` rows.

    A row is a sample; with ``offsets [n + 1]`` sample ``i`` is the tokens ``offsets[i]:offsets[i + 1]`` of all rows in a line.
    """

    def __init__(self, offsets: Tensor | None = None):
        self.offsets = offsets
        self.calls: list[Call] = []
        self.batch_size: int | None = None
        self.unattributed: set[int] = set()  # parameters used where no sample can be told apart
        self.on_arrival: Callable[[], None] | None = None  # told of every gradient, in the midst of the backward pass

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        """The gradient at output ``index`` of ``call`` has come; several backward passes add up, as they do in ``.grad``."""
        if self.on_arrival is not None:
            self.on_arrival()
        if not call.grad_output:
            self.calls.append(call)
        call.grad_output[index] = call.grad_output[index] + grad if index in call.grad_output else grad

    def covered(self) -> set[int]:
        """The parameters, by id, whose gradient the recorded calls explain."""
        return {id(p) for call in self.calls for p in call.parameters()} - self.unattributed


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that are recorded as one call each, by name."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{layer}.") or layer == "" for layer in layers):
            continue
        whole = isinstance(module, nn.MultiheadAttention) or is_parametrized(module)
        leaf = not any(True for _ in module.children())
        if (whole or leaf) and any(p.requires_grad for p in module.parameters()):
            layers[name] = module
    return layers


_TENSOR_PROPERTIES = {torch.Tensor.T.__get__, torch.Tensor.mT.__get__, torch.Tensor.data.__get__, torch.Tensor.H.__get__}


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensor arguments of a torch function, inside lists and tuples too."""
    found = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


class Recorder(TorchFunctionMode):
    """The hooks on a model's layers, and the function mode that follows the batch between them.

    Hooks fire from ``attach`` to ``detach``, and record between ``begin`` and ``end``. Checkpointed layers run again in
    the backward pass, after ``end``: these are recorded as long as ``recording`` is set.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.recording: Recording | None = None
        self.open = False
        self.handles: list[Any] = []
        self._reset()

    def attach(self) -> None:
        model = self.model
        layers = _layers(model)
        for name, module in layers.items():
            leave = partial(self._leave_layer, name or type(module).__name__)
            self.handles += [
                module.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
                module.register_forward_hook(leave, with_kwargs=True, prepend=True),
                module.register_forward_hook(self._close_layer, always_call=True),
            ]
        if "" not in layers:
            self.handles += [
                model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
                model.register_forward_hook(self._leave_model, prepend=True),
                model.register_forward_hook(self._close_model, always_call=True),
            ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _reset(self) -> None:
        self.batch = Batch()
        self.sources = WeakIdKeyDictionary()  # tensors made of parameters without samples, each with its Ref
        self.inside_model = self.inside_layer = 0
        self.rng: RngState | None = None
        self.buffers: dict[str, Tensor] = {}
        self.scored = False  # whether the layer now running takes care of its own scores

    def begin(self, recording: Recording) -> None:
        self._reset()
        self.recording = recording
        self.trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        self.open = True
        self.__enter__()

    def end(self) -> None:
        self.open = False
        self.__exit__(None, None, None)

    @property
    def active(self) -> bool:
        return self.open or (self.recording is not None and _in_backward())

    # the model as a whole: its arguments are the batch

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.open:
            return
        self.inside_model += 1
        if self.inside_model == 1:
            new = self._untagged(pytree.tree_leaves((args, kwargs)))
            if new and self.batch.n not in (None, new[0].shape[0]):
                raise ValueError(
                    f"the model was called with batches of {self.batch.n} and {new[0].shape[0]} samples within one `with cache`"
                )
            self._tag_by_size(new)

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.open or self.inside_model > 1:
            return
        for x in pytree.tree_leaves(output):
            # made by ways that carry no tags (through numpy, say): exact all the same, as one long replay
            if isinstance(x, Tensor) and x in self.sources and x.ndim and x.shape[0] == self.batch.n:
                call = Call("output", Tensor.clone, (self.sources[x],), {}, {})
                self._watch(call, [x], lambda out: (0, 1))

    def _close_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_model -= self.open

    def _untagged(self, leaves: list[Any]) -> list[Tensor]:
        return [x for x in leaves if isinstance(x, Tensor) and x.ndim and not self.batch[x] and not self._is_source(x)]

    def _tag_by_size(self, tensors: list[Tensor]) -> None:
        if tensors and self.batch.n is None:
            self.batch.n = self.recording.batch_size = tensors[0].shape[0]
        for x in tensors:
            self.batch.tag(x, (0, 1))

    def _is_source(self, x: Tensor) -> bool:
        return x.requires_grad and (id(x) in self.trainable or x in self.sources)

    # layers

    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.active:
            return
        self.inside_layer += 1
        new = self._untagged(pytree.tree_leaves((args, kwargs)))
        # inside the model the batch is followed from its arguments; a tensor with a graph but no tag took a way unseen
        self._tag_by_size([x for x in new if x.requires_grad] if self.inside_model else new)
        self.rng, self.buffers = None, {}
        if module.training and layer_kind(module) is None:
            self.rng = rng_state(next(module.parameters()).device)
            self.buffers = {k: x.clone() for k, x in module.named_buffers()}  # the call may write them

    def _close_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_layer -= self.active
        self.scored = False

    def _leave_layer(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self.active or not torch.is_grad_enabled() or self.batch.n is None:
            return
        outs = pytree.tree_leaves(output)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tag = next((self.batch[x] for x in tensors if self.batch[x]), None)
        if tag is not None and tag[0] != _batch_axis(module, tag[0]):
            raise ValueError(f"'{name}' ({type(module).__name__}) has batch_first=False, but its batch is dimension {tag[0]}")
        whole = layer_kind(module) is None
        if self.scored:
            self.batch.tag(output, tag)
            return
        own = {k: p for k, p in module.named_parameters(recurse=whole) if p.requires_grad}
        call = Call(name, module, *self._recorded(args, kwargs), own, rng=self.rng, buffers=self.buffers)

        def place(out: Tensor) -> Tag | None:
            axis, rows = tag
            if isinstance(module, nn.RNNBase) and out is not outs[0]:
                return 1, rows  # the last states: [layers, n, d]
            axes = [x for x in (axis, 0, 1) if x < out.ndim and out.shape[x] == self.batch.n * rows]
            return (axes[0], rows) if axes else None

        self._classify(call, tensors, tag is not None, outs, place)

    # torch functions outside of layers

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        prop = getattr(func, "__name__", "") == "__get__" and func not in _TENSOR_PROPERTIES
        if self.inside_layer or self.batch.n is None or prop:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        if _in_backward():  # a checkpoint's recomputation: its inputs come without tags
            self._tag_by_size([x for x in self._untagged(tensors) if x.requires_grad])
        batched = any(self.batch[x] for x in tensors)
        meets_parameters = torch.is_grad_enabled() and any(self._is_source(x) for x in tensors)
        if not batched and not meets_parameters:
            return func(*args, **kwargs)

        name = getattr(func, "__name__", str(func))
        call = None
        if meets_parameters:
            inplace = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            first = args[0].detach().clone() if inplace and not self._is_source(args[0]) else None
            rng = rng_state(tensors[0].device)
            recorded_args, recorded_kwargs = self._recorded(args, kwargs)
            if first is not None:
                recorded_args = (first, *recorded_args[1:])
            call = Call(name, func, recorded_args, recorded_kwargs, {}, rng=rng, inplace=inplace)
        out = func(*args, **kwargs)
        outs = pytree.tree_leaves(args[0] if out is None else out)

        def place(x: Tensor) -> Tag | None:
            return self.batch.infer(func, args, kwargs, tensors, x)

        if call is not None:
            self._classify(call, tensors, batched, outs, place)
        else:
            for x in outs:
                if isinstance(x, Tensor):
                    self.batch.tag(x, place(x))
        return out

    # what becomes of a call

    def _recorded(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with every tensor made of parameters alone replaced by the call that made it."""
        return pytree.tree_map(
            lambda x: self.sources[x] if isinstance(x, Tensor) and x.requires_grad and x in self.sources else x, (args, kwargs)
        )

    def _classify(self, call: Call, tensors: list[Tensor], batched: bool, outs: list[Any], place: Callable) -> None:
        if batched:
            self._watch(call, outs, place)
        elif any(x.requires_grad and not self._is_source(x) for x in tensors):
            self._give_up(call)
        else:
            for i, x in enumerate(outs):
                if isinstance(x, Tensor) and x.requires_grad:
                    self.sources[x] = Ref(call, i)

    def _watch(self, call: Call, outs: list[Any], place: Callable[[Tensor], Tag | None]) -> None:
        for i, x in enumerate(outs):
            if not isinstance(x, Tensor):
                continue
            tag = place(x)
            self.batch.tag(x, tag)
            self.sources.pop(x, None)
            if x.requires_grad and tag is None:
                self._give_up(call)
            elif x.requires_grad:
                call.watch(i, x, tag, self.recording.receive)

    def _give_up(self, call: Call) -> None:
        self.recording.unattributed.update(id(p) for p in call.parameters())


def _batch_axis(module: nn.Module, axis: int) -> int:
    """Where a layer that mixes positions expects the batch; any axis will do for the others."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return 0 if module.batch_first else 1
    return axis
