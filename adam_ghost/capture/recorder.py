"""Records the layer calls of a training step: what went in, and the gradient that came back at what went out."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.capture.attention import declare_attention
from adam_ghost.capture.batch import Batch, Blocks, Followed, Tag
from adam_ghost.capture.calls import Call, Ref, RngState, rng_state
from adam_ghost.capture.declared import DECLARED, PASSING, custom_function, declare_known
from adam_ghost.capture.heads import HEADS, declare_heads
from adam_ghost.capture.hooks import FunctionMode, Hook, refuse_compiling
from adam_ghost.capture.kinds import batch_axis, is_known, layer_kind, output_axis, token_axis
from adam_ghost.capture.leaves import leaves_of, leaves_of_call
from adam_ghost.capture.pointwise import FACTORIES
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.rows import Packing
from adam_ghost.capture.surroundings import Surroundings
from adam_ghost.capture.walk import Tree


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


# functions that return nothing, but write to their first argument
_DATA: Any = Tensor.data
_WRITING = {Tensor.__setitem__, _DATA.__set__}

# functions that take but the shape or type of the tensors after the first
_LIKE = {"expand_as", "view_as", "reshape_as", "type_as", "to"}


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _writes(name: str) -> bool:
    """Whether the function of this name changes its first argument in place."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and f"__{name[3:]}" in dir(Tensor))  # __iadd__, of __add__
    return name.endswith("_")


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensor arguments of a torch function, inside lists and tuples too."""
    found = []
    for x in (*args, *(x for name, x in kwargs.items() if name != "out")):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [y for y in x if isinstance(y, Tensor)]
    return found


def _depend_on_each_other(outs: list[Any], inputs: list[Tensor]) -> bool:
    """Whether any of a layer's results was made of another, or is one."""
    made = [x.grad_fn for x in outs if isinstance(x, Tensor) and x.grad_fn is not None]
    if len(made) < 2:
        return False
    before = {x.grad_fn for x in inputs}
    for i, node in enumerate(made):
        others = {*made[:i], *made[i + 1 :]}
        found, visited = [node], set()
        while found:
            node = found.pop()
            if node in others:
                return True
            visited.add(node)
            found += [parent for parent, _ in node.next_functions if parent is not None and parent not in visited | before]
    return False


class Recorder:
    """The hooks on a model's layers, and the function mode that follows the batch between them.

    Hooks fire from ``attach`` to ``detach``, and record between ``begin`` and ``end``. Checkpointed layers run again in
    the backward pass, after ``end``: these are recorded as long as ``recording`` is set.
    """

    def __init__(self, model: nn.Module, tree: Tree | None = None):
        self.model = model
        self._tree = tree or Tree(model)
        self._named: dict[str, nn.Parameter] = {}  # of the model, and which of them are trained, as ``names`` was made
        self._trained: list[bool] = []
        self.mode = FunctionMode(self._follow)
        self.recording: Recording | None = None
        self.open = False
        self.handles: list[Any] = []
        self.root_handles: list[Any] = []  # on the model as a whole
        self.names: dict[Tensor, str] = {}  # of the parameters that are trained now
        # by module and attribute, where the modules have other tensors while they run (fully_shard)
        self._attributes: dict[nn.Module, list[tuple[str, str]]] = {}
        self._reset()

    def attach(self) -> None:
        declare_known()
        declare_heads()
        declare_attention()
        known: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        if any(hasattr(p, "to_local") for p in known):
            for module in self.model.modules():
                own = module.named_parameters(recurse=False)
                self._attributes[module] = [(name, known[p]) for name, p in own if p in known]
        self._attach_parts()
        if not isinstance(self.model, torch.jit.ScriptModule) and "" not in _layers(self.model):
            self._attach_model(self.model)

    def _attach_parts(self) -> None:
        """On everything but the model as a whole."""
        model = self.model
        layers = _layers(model)
        for name, module in layers.items():
            self._attach_layer(module, name or type(module).__name__)
        for name, module in model.named_modules():
            part = any(name == layer or name.startswith(f"{layer}.") or layer == "" for layer in layers)
            if not part and name and not isinstance(module, torch.jit.ScriptModule):
                self._attach_model(module)

    def _attach_layer(self, module: nn.Module, name: str) -> None:
        self.handles += [
            module.register_forward_pre_hook(Hook(self._enter_layer), with_kwargs=True),
            module.register_forward_hook(Hook(partial(self._leave_layer, name)), with_kwargs=True, prepend=True),
            module.register_forward_hook(Hook(self._close_layer), always_call=True),
        ]

    def _attach_model(self, module: nn.Module) -> None:
        handles = self.root_handles if module is self.model else self.handles
        handles += [
            module.register_forward_pre_hook(Hook(self._enter_model), with_kwargs=True),
            module.register_forward_hook(Hook(self._leave_model), prepend=True),
            module.register_forward_hook(Hook(self._close_model), always_call=True),
        ]

    def _name(self, module: nn.Module) -> None:
        for attribute, name in self._attributes.get(module, ()):
            p = getattr(module, attribute)
            if p.requires_grad:
                self.names[p] = name

    def detach(self) -> None:
        self.end()
        for handle in (*self.handles, *self.root_handles):
            handle.remove()
        self.handles, self.root_handles = [], []

    def _reset(self, packing: Packing | None = None) -> None:
        self.batch = Batch(packing)
        self.sources = WeakIdKeyDictionary()  # tensors made of parameters without samples, each with its Ref
        self.inner = WeakIdKeyDictionary()  # the same, within the layer now running
        self.aside = WeakIdKeyDictionary()  # the same again, made in a way that nothing shows: no call leads to them
        self.constants = WeakIdKeyDictionary()  # tensors made of nothing else while gradients were off
        # where the batch was, or that it was lost, in a layer's i-th argument and result
        self.entries: dict[tuple[nn.Module, int], set[Followed | None]] = {}
        self.exits: dict[tuple[nn.Module, int], set[Followed | None]] = {}
        self.follow = False  # whether the layer now running is followed function by function
        self.buffers: dict[str, Tensor] = {}
        self.surroundings: Surroundings | None = None
        self.inside_model = self.inside_layer = 0
        self.rng: RngState | None = None
        self.scored = False  # whether the layer now running takes care of its own scores

    def begin(self, recording: Recording) -> None:
        self._reset(recording.packing)
        self.recording, recording.doubts = recording, self.batch.doubts
        named = self._tree.named_parameters()
        trained = [p.requires_grad for p in named.values()]
        if named is not self._named or trained != self._trained or self._attributes:
            self._named, self._trained = named, trained
            self.names = {p: name for name, p in named.items() if p.requires_grad}
        for module in self._attributes:
            self._name(module)
        self.open = True
        self.mode.__enter__()

    def end(self) -> None:
        """Records no longer; also after a forward pass that an interrupt (Ctrl-C) broke off, which no hook is told of."""
        self.open = False
        self.batch.nodes.clear()
        self.mode.remove()

    @property
    def _into(self) -> Recording:
        """The recording, where a hook has something for it."""
        assert self.recording is not None
        return self.recording

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
        refuse_compiling()
        self._name(module)
        self._pass_on(leaves_of_call(args, kwargs))
        if self.inside_model == 1:
            new = self._untagged(leaves_of_call(args, kwargs))
            if new and module is self.model and self.batch.n not in (-1, new[0].shape[0]):
                raise ValueError(
                    f"the model was called with batches of {self.batch.n} and {new[0].shape[0]} samples within one `with cache`"
                )
            self._tag_by_size(new)

    @unseen
    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.in_forward or self.inside_model > 1:
            return
        for x in leaves_of(output):
            # made by ways that carry no tags (through numpy, say): exact all the same, as one long replay
            alone = (
                isinstance(x, Tensor) and x.ndim and x.shape[0] == self.batch.n and (x.shape.count(x.shape[0]) == 1 or len(x) == 1)
            )
            if alone and x in self.sources:
                call = Call("output", Tensor.clone, (self.sources[x],), {}, {}, self.names)
                self._watch(call, 0, x, self.batch.argument(x))

    def _close_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_model -= self.in_forward

    def _pass_on(self, leaves: list[Any]) -> None:
        """Gives tensors that came through a passing function the tags that they went in with."""
        if not PASSING:
            return
        for x in leaves:
            if isinstance(x, Tensor) and x not in self.batch and custom_function(x.grad_fn) in PASSING and x.grad_fn is not None:
                origin = self.batch.made_by(*x.grad_fn.next_functions[x.output_nr])
                if origin is not None:
                    self.batch.tag(x, self.batch[origin])

    def _untagged(self, leaves: list[Any]) -> list[Tensor]:
        return [x for x in leaves if isinstance(x, Tensor) and x.ndim and x not in self.batch and not self._is_source(x)]

    def _tag_by_size(self, tensors: list[Tensor]) -> None:
        if tensors and self.batch.n < 0:
            self.batch.n = self._into.batch_size = tensors[0].shape[0]
        for x in tensors:
            passed = x.grad_fn is not None and self.batch.reached_from(x)[0]  # samples came to it in a way that nothing shows
            self.batch.tag(x, None if passed else self.batch.argument(x))

    def _is_source(self, x: Tensor) -> bool:
        return x.requires_grad and (x in self.names or x in self.sources or x in self.inner)

    def _look_into(self, x: Tensor) -> None:
        """A tensor with a graph that no function was seen to make: lost, unless its graph shows that no sample is in it."""
        if x.grad_fn is None or x in self.batch or x in self.aside or self._is_source(x):
            return
        if x in self.constants and custom_function(x.grad_fn) is CheckpointFunction:
            self.aside[x] = True  # its graph shows all that entered the checkpoint
            return
        passed, leaves = self.batch.reached_from(x)
        if passed:
            self.batch.tag(x, None)
        elif self.inside_layer:
            self.inner[x] = True
        else:
            self.aside[x] = True
            self._into.unattributed.update(self.names[p] for p in leaves if p in self.names)

    def leads(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether the samples are the leading dimension of ``x [..., d]``, the input of ``layer``; of packed rows, the tokens."""
        tag = self.batch[x]
        return tag is not None and self.batch.in_line(x, tag)

    def told(self, x: Tensor) -> Tag | None:
        """Where samples are in ``x``, as calls tell it."""
        tag = self.batch[x]
        return None if tag is None else self.batch.told(x, tag)

    # layers

    @unseen
    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.active:
            return
        self.inside_layer += 1
        refuse_compiling()
        self._name(module)
        leaves = leaves_of_call(args, kwargs)
        self._pass_on(leaves)
        new = self._untagged(leaves)
        if _in_backward():
            self._tag_again(module, leaves, new)
        elif self.inside_model:  # the batch is followed from the model's arguments
            for x in new:
                self._look_into(x)
        else:
            self._tag_by_size([x for x in new if x not in self.aside])
        self._remember(self.entries, module, leaves)
        self.rng, self.buffers, self.surroundings = None, {}, None
        if layer_kind(module) is None:
            self.rng = rng_state(next(module.parameters()).device)
            if module.training:
                self.buffers = {k: x.clone() for k, x in module.named_buffers()}
        self.follow = not is_known(module)
        if self.follow and layer_kind(module) is None:
            self.surroundings = Surroundings(module.modules())
        self.inner = WeakIdKeyDictionary()

    def _remember(self, places: dict[tuple[nn.Module, int], set[Followed | None]], module: nn.Module, leaves: list[Any]) -> None:
        if self.in_forward:
            for i, x in enumerate(leaves):
                if isinstance(x, Tensor) and x in self.batch:
                    places.setdefault((module, i), set()).add(self.batch[x])

    def _as_before(
        self, places: dict[tuple[nn.Module, int], set[Followed | None]], module: nn.Module, i: int, x: Tensor
    ) -> Followed | None:
        """Where the batch was when a checkpoint first ran; it runs again out of the function mode's sight."""
        tags = [tag for tag in places.get((module, i), ()) if tag is None or self.batch.fits(x, tag)]
        return tags[0] if len(tags) == 1 else None

    def _tag_again(self, module: nn.Module, leaves: list[Any], new: list[Tensor]) -> None:
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor) and x.requires_grad and any(x is y for y in new):
                hidden = self.batch.hidden_on_the_way_to(x)
                self.batch.tag(x, None if hidden else self._as_before(self.entries, module, i, x))

    def _close_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside_layer -= self.active
        self.scored = False

    @unseen
    def _leave_layer(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if not self.active or self.batch.n < 0:
            return None
        outs, spec = pytree.tree_flatten(output)
        tensors = [x for x in leaves_of_call(args, kwargs) if isinstance(x, Tensor)]
        first = next((x for x in tensors if self.batch[x]), None)
        tag = None if first is None else self.batch[first]
        if isinstance(tag, Blocks) and tag.axis != batch_axis(module, tag.axis):
            raise ValueError(f"'{name}' ({type(module).__name__}) has batch_first=False, but its batch is dimension {tag.axis}")
        if self.scored:
            self.batch.tag(output, tag)
            return None

        if self.follow and self.in_forward:
            for x in outs:
                if isinstance(x, Tensor):
                    self._look_into(x)
        new_output, made = None, [x for x in outs if isinstance(x, Tensor)]
        if not is_known(module) and _depend_on_each_other(outs, tensors):
            # the gradient at one would hold that at the others, which were made of it
            outs = [self._alias(x) if isinstance(x, Tensor) and x.requires_grad else x for x in outs]
            new_output = pytree.tree_unflatten(outs, spec)

        def place(i: int, out: Tensor) -> Followed | None:
            if not is_known(module):
                return self._as_before(self.exits, module, i, out) if _in_backward() else self.batch[out]
            tagged = self.batch.tagged(tensors)
            tags = {i: found for i, x in enumerate(tensors) for y, found in tagged if x is y}
            land = partial(output_axis, module, i, tensors)
            return self.batch.through(tags, tensors, out, land, partial(token_axis, module, i, tensors))

        whole = layer_kind(module) is None
        own = {k: p for k, p in module.named_parameters(recurse=whole) if p.requires_grad}
        call = Call(name, module, *self._recorded(args, kwargs), own, self.names, self.rng, False, self.buffers, self.surroundings)
        if any(isinstance(x, Tensor) and x.requires_grad for x in vars(module).values()):
            self._give_up(call)  # a weight that some hook computes and leaves on the module: no replay reaches its parameters
        if self._attributes:
            call.weights_move()
        self._classify(call, tensors, outs, place, [] if new_output is None else made)
        self._remember(self.exits, module, outs)
        return new_output

    def _alias(self, x: Tensor) -> Tensor:
        """Another tensor of the same values and samples, whose gradient is that of its own uses."""
        alias = x.view_as(x)
        if x in self.batch:
            self.batch.tag(alias, self.batch[x])
        if x in self.inner:
            self.inner[alias] = True
        return alias

    # torch functions outside of layers

    def _follow(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is Tensor.__iter__ and not self.inside_layer:
            with self.mode:
                return iter(args[0].unbind(0))
        if (self.inside_layer and not self.follow) or self.batch.n < 0:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if func in FACTORIES or (name == "__get__" and func not in _TENSOR_PROPERTIES):
            return func(*args, **kwargs)
        tensors = _tensors(args[:1] if name in _LIKE else args, kwargs)
        for x in tensors:
            self._look_into(x)
        batched = any(x in self.batch for x in tensors)
        meets_parameters = torch.is_grad_enabled() and any(self._is_source(x) for x in tensors)
        if not batched and not meets_parameters:
            out = func(*args, **kwargs)
            self._keep_constants(tensors, leaves_of(out))
            return out

        call = None
        inplace = _writes(name)
        before = self.batch[args[0]] if inplace else None
        base = args[0]._base if inplace else None
        blank = base is not None and (base in self.batch or not base.requires_grad)
        if func in DECLARED:
            tags = {i: tag for i, x in enumerate(args) if isinstance(x, Tensor) and (tag := self.batch[x])}
            axes = {i: tag.axis for i, tag in tags.items() if isinstance(tag, Blocks)}
            if len(axes) == len(tags):
                DECLARED[func].try_out(args, kwargs, axes, self.batch.n)
        if meets_parameters and not self.inside_layer:
            first = args[0].detach().clone() if inplace and not self._is_source(args[0]) else None
            rng = rng_state(tensors[0].device)
            recorded_args, recorded_kwargs = self._recorded(args, kwargs)
            if first is not None:
                recorded_args = (first, *recorded_args[1:])
            does = HEADS.get(func, func)
            call = Call(name, does, recorded_args, recorded_kwargs, {}, self.names, rng=rng, inplace=inplace)
            if self._attributes:
                call.weights_move()
        tagged = any(self.batch[x] for x in tensors)
        out = func(*args, **kwargs)
        if out is None and func not in _WRITING:  # backward, retain_grad and the like leave tensors as they were
            return out
        outs = leaves_of(args[0] if out is None else out)

        def place(i: int, x: Tensor) -> Followed | None:
            if call is not None and func in HEADS:
                return self._rows_of_head(call, tensors[0], tensors[1])
            return self.batch.infer(func, args, kwargs, tensors, x, i) if tagged else None

        if call is not None:
            self._classify(call, tensors, outs, place)
        else:
            for i, x in enumerate(outs):
                if isinstance(x, Tensor) and batched:
                    self.batch.tag(x, place(i, x))
                    self.inner.pop(x, None)
                elif isinstance(x, Tensor) and x.requires_grad and all(self._is_source(t) for t in tensors if t.requires_grad):
                    self.inner[x] = True
        if batched and base is not None and self.batch[args[0]] != before:
            self._written_through(args[0], base, blank)
        return out

    def _rows_of_head(self, call: Call, hidden: Tensor, weight: Tensor) -> Followed | None:
        """The tag of the rows ``[N]`` of a head's definition, of hidden rows ``[N, d]``."""
        tag = self.batch[hidden]
        if tag is None or hidden.ndim != 2 or weight.ndim != 2:
            return None
        call.rows = len(hidden)
        axis = lambda axes: 0 if set(axes.values()) == {0} else None  # noqa: E731
        return self.batch.through({0: tag}, [hidden], hidden.detach()[:, 0], axis, lambda i, d: None)

    def _written_through(self, view: Tensor, base: Tensor, blank: bool) -> None:
        """Samples were written into ``base`` through a view of it, or mixed; ``blank``: it held nothing but samples before."""
        tag = self.batch.seen_through(view, base) if blank else None
        if tag is not None and self.batch[base] in (None, tag):
            self.batch.tag(base, tag)
        else:
            self._lose(base)

    def _keep_constants(self, tensors: list[Tensor], outs: list[Any]) -> None:
        if not torch.is_grad_enabled() and all(x in self.constants or isinstance(x, nn.Parameter) for x in tensors):
            self.constants.update((x, True) for x in outs if isinstance(x, Tensor))

    # what becomes of a call

    def _recorded(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with every tensor made of parameters alone replaced by the call that made it."""
        if not any(isinstance(x, Tensor) and x.requires_grad and x in self.sources for x in leaves_of_call(args, kwargs)):
            return args, kwargs
        return pytree.tree_map(
            lambda x: self.sources[x] if isinstance(x, Tensor) and x.requires_grad and x in self.sources else x, (args, kwargs)
        )

    def _classify(
        self,
        call: Call,
        tensors: list[Tensor],
        outs: list[Any],
        place: Callable[[int, Tensor], Followed | None],
        aliased: Sequence[Tensor] = (),
    ) -> None:
        """Samples met parameters: the outputs are watched. Parameters alone: they are sources. What is lost is given up.

        ``aliased``: of what the outputs are other names.
        """
        outs = [(i, x) for i, x in enumerate(outs) if isinstance(x, Tensor)]
        if any(self.batch.lost(x) for x in tensors):
            # a penalty added to the loss takes nothing from what the samples' calls explain of its parameters, and what a
            # checkpoint loses with gradients off is given up when it runs again
            inside = self.inside_model or any(x.ndim for x in tensors if self.batch.lost(x))
            if inside and torch.is_grad_enabled():
                self._give_up(call)
            for _, x in outs:
                self._lose(x)
        elif any(self.batch[x] for x in tensors):
            for i, x in outs:
                if x in self.inner and x not in self.batch:
                    self.sources[x] = Ref(call, i)
                else:
                    self._watch(call, i, x, place(i, x), [*tensors, *aliased])
        elif any(x.requires_grad and not self._is_source(x) for x in tensors):
            self._give_up(call)
        elif torch.is_grad_enabled():
            for i, x in outs:
                if x.requires_grad:
                    self.sources[x] = Ref(call, i)
        else:
            self._keep_constants(tensors, [x for _, x in outs])

    def _watch(self, call: Call, index: int, out: Tensor, tag: Followed | None, inputs: Sequence[Tensor] = ()) -> None:
        self.batch.tag(out, tag)
        self.sources.pop(out, None)
        if not out.requires_grad:
            return
        rows = out if call.rows is None else out.detach().new_empty(call.rows)
        told = None if tag is None else self.batch.told(rows, tag)
        if told is None:
            self._give_up(call)
            return
        recording = self._into
        recording.awaits(call.watch(index, out, told, inputs, recording.receive))

    def _lose(self, x: Tensor) -> None:
        self.sources.pop(x, None)
        self.batch.tag(x, None)

    def _give_up(self, call: Call) -> None:
        self._into.unattributed.update(call.parameters())
