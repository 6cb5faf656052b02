"""Learn once: steps of a known kind run with eyes on the layers alone, no function is followed where none has to be.

The first steps of a kind are followed by the recorder, function by function. What they teach is a route: which layers run in
which order, and where the samples are in what they return. When two steps of a kind took the same route, later ones take it
with one stand-in per layer. Bodies of modules that handle parameters by functions of torch (a position embedding that is added,
say) are followed as ever, and what they call is not. Where a body orders the samples by values (sorts them by length, say), it
is followed with all that it calls: the next step's values may order them otherwise, and no graph would show it.

A step on a route is verified: the layers and their order, the batch's size in every output, and, when the model's outputs are
there, the whole autograd graph behind them: every node's kind, its dimensions and the parameters that it ends in, and of every
reshape that samples go through, that the sizes of this step keep them apart too. Where a step left its route it cannot be scored;
``Recording.deviation`` says so, and the kind is followed from then on.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adam_ghost.capture.batch import Blocks
from adam_ghost.capture.calls import Again, Call, Receive
from adam_ghost.capture.graph import graph_of, keep_apart
from adam_ghost.capture.hooks import Hook, Told
from adam_ghost.capture.kinds import layer_kind
from adam_ghost.capture.leaves import leaves_of
from adam_ghost.capture.recorder import Recorder, _in_backward, unseen
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.route import Given, Lesson, Named, Places, Route, Stop
from adam_ghost.capture.rows import Rows
from adam_ghost.capture.rules import RESHAPES
from adam_ghost.capture.walk import Tree

AGREEING = 2  # followed steps of a kind that have to agree before it is taken for granted


class LearningRecorder(Recorder):
    """A recorder that takes known kinds of steps by their routes; what it records is the same, to the bit."""

    def __init__(self, model: nn.Module, tree: Tree | None = None):
        super().__init__(model, tree)
        self._routes: dict[Hashable, Route | None] = {}  # None: left once, followed for good
        self._lessons: dict[Hashable, tuple[Route, int]] = {}  # the last one's, and how many agreed
        self._lesson: Lesson | None = None
        self._route: Route | None = None  # of the step now running
        self._hung: Route | None = None  # whose hooks are on the model, if any; else those of all layers
        self._attached = False
        self._told: list[Told] = []  # the layers of the route whose hooks are on the model, or were last
        self._listening = False  # whether they tell
        self._stop = self._part = self._heard = 0  # how many were passed
        self._arguments: list[Any] = []
        self._receive: Receive = _nowhere

    # hooks

    def attach(self) -> None:
        self._attached = True
        if self._hung is None:
            super().attach()
        else:
            self._hang(self._hung)
            self._attach_model(self.model)

    def detach(self) -> None:
        super().detach()
        self._attached = False

    def end(self) -> None:
        super().end()
        self._listen(False)
        self._receive = _nowhere

    def _listen(self, on: bool) -> None:
        """Has the layers on the route tell of their calls, or no longer."""
        if on is self._listening:
            return
        self._listening = on
        for told in self._told:
            if on:
                told.attach()
            else:
                told.detach()

    def _change(self, route: Route | None) -> None:
        """Puts the hooks of a route on the model, or those of all layers, in place of the others."""
        if route is self._hung or not self._attached:
            return
        for handle in self.handles:
            handle.remove()
        self.handles, self._hung, self._told = [], route, []
        if route is None:
            self._attach_parts()
        else:
            self._hang(route)

    def _hang(self, route: Route) -> None:
        for module, name in route.inside.items():
            self._attach_layer(module, name)
        for module in route.followed - {self.model}:
            self._attach_model(module)
        for module in {part for part, *_ in route.parts}:
            self.handles += [
                module.register_forward_pre_hook(Hook(self._enter_part), with_kwargs=True),
                module.register_forward_hook(Hook(self._leave_part), prepend=True),
            ]
        if not self._told:
            self._told = [Told(layer, self._pass) for layer in {stop.layer for stop in route.stops}]

    # a step begins and ends

    def begin(self, recording: Recording) -> None:
        self._conclude()
        self._route = None
        self._receive = recording.receive
        super().begin(recording)

    def _conclude(self) -> None:
        """Takes in what the last followed step taught, now that its backward pass is over as well."""
        lesson, self._lesson = self._lesson, None
        if lesson is None or lesson.kind in self._routes:
            return
        if lesson.void or lesson.route is None:
            self._lessons.pop(lesson.kind, None)
            return
        before, agreed = self._lessons.get(lesson.kind, (lesson.route, 0))
        agreed = agreed + 1 if lesson.route.same(before) else 1
        self._lessons[lesson.kind] = lesson.route, agreed
        if agreed >= AGREEING:
            self._routes[lesson.kind] = lesson.route

    def _kind(self, leaves: list[Any], spec: Any, n: int) -> Hashable:
        """What one route serves: how the model is called with ``n`` rows, as a pattern of sizes, and what is to become of it."""
        described: list[Hashable] = []
        for x in leaves:
            if isinstance(x, Tensor):
                described.append((x.dtype, x.requires_grad, *(s == n for s in x.shape), *(s == 1 for s in x.shape)))
            else:
                plain: Hashable = x if x is None or isinstance(x, (bool, str)) else type(x).__qualname__
                described.append(plain)
        recording = self._into
        device = next(iter(self.names)).device.type if self.names else "cpu"
        # one sample in a row is attended to in another way than several
        packed = None if recording.packing is None else len(recording.packing.offsets) - 1 > n
        how = self.model.training, torch.is_autocast_enabled(device), packed, type(recording), recording.beyond
        return tuple(described), spec, how, getattr(recording, "keep", False), len(self.names)

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.in_forward and self.inside_model == 0:
            self._set_out(module, args, kwargs)
        super()._enter_model(module, args, kwargs)
        if self._lesson is not None and self.in_forward:
            self._lesson.bodies.append(module)
            with torch._C.DisableTorchFunction():
                self._lesson.given.append(self._given((args, kwargs)))
        if self._route is not None and module not in self._route.followed:
            self.mode.remove()

    def _set_out(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._lesson = None
        if self._route is not None or self.batch.n >= 0:  # a second pass within one recording
            if self._route is not None:
                self._deviate("the model ran twice")
            return
        route = None
        if module is self.model and torch.is_grad_enabled():
            with torch._C.DisableTorchFunction():
                leaves, spec = pytree.tree_flatten((args, kwargs))
                n = next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), 0)
                kind = self._kind(leaves, spec, n)
            if kind in self._routes and n:  # of no rows, nothing shows where they would be
                route = self._routes[kind]
            elif n:
                self._lesson = Lesson(kind, leaves)
            self._kind_now, self._arguments = kind, leaves
        self._listen(False)
        self._change(route)
        self._route, self._stop, self._part, self._heard = route, 0, 0, 0
        self._listen(route is not None)

    def _deviate(self, what: str) -> None:
        """The step left its route: it cannot be scored, and the kind is followed from now on."""
        if self._route is None:
            return
        self._routes[self._kind_now] = None
        self._route = None
        self._into.deviation = (
            f"{what}, unlike in earlier steps of its kind: this step has no scores; later ones are followed closely"
        )
        self.mode.remove()

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        lesson = self._lesson if self.in_forward else None
        if lesson is not None and any(self._is_source(x) for x in leaves_of(output) if isinstance(x, Tensor)):
            lesson.add(Named("output", None), None)
        super()._leave_model(module, args, output)
        if not self.in_forward:
            return
        if lesson is not None:
            if self.inside_model > 1:
                tags = self._tags(output)
                if tags is None:
                    lesson.void = True
                else:
                    lesson.exits.append((len(lesson.calls), lesson.bodies[:-1], module, lesson.given[-1], tags))
            elif not self._into.unattributed:
                lesson.end(*graph_of(output, self.names), self.names)
                lesson.made, lesson.reshapes = [], {}  # the graph is the loop's
        elif self._route is not None and self.inside_model == 1:
            route = self._route
            graph, nodes = graph_of(output, self.names)
            if self._stop != len(route.stops) or self._part != len(route.parts):
                self._deviate(f"the model ended after {self._stop} of {len(route.stops)} layers")
            elif graph != route.graph:
                self._deviate("the model's autograd graph is another one")
            elif not keep_apart(nodes, route.reshapes, self.batch.n):
                self._deviate("samples were reshaped into each other")
        if self._into.deviation and self.inside_model == 1:
            arrival = self._into.on_arrival
            for x in leaves_of(output):
                if isinstance(x, Tensor) and x.requires_grad and arrival is not None:
                    x.register_hook(lambda grad: arrival())

    def _close_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        super()._close_model(module, args, output)
        if self.inside_model == 0:
            self._listen(False)
        if self._lesson is not None and self._lesson.bodies and self.in_forward:
            self._lesson.bodies.pop()
            self._lesson.given.pop()

    # a followed step

    def _classify(self, call: Call, tensors: list[Tensor], outs: list[Any], place: Any, aliased: Sequence[Tensor] = ()) -> None:
        super()._classify(call, tensors, outs, place, aliased)
        self._heard += 1
        lesson = self._lesson
        if lesson is None:
            return
        if _in_backward() or not lesson.bodies:
            lesson.void = True  # a checkpoint that runs again, a layer that is called outside of the model
            return
        stop = self._as_stop(call, tensors)
        lesson.add(Named(call.name, call.fn), stop, self._given(tensors), self._tags(outs), None if stop is None else outs[0])

    def _leave_layer(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        scored = self.scored
        new_output = super()._leave_layer(name, module, args, kwargs, output)
        lesson = self._lesson
        self._heard += scored
        if scored and lesson is not None and self.active:
            if _in_backward() or not lesson.bodies:
                lesson.void = True
                return new_output
            found = self.batch[output]
            tag = found if args and isinstance(found, Blocks) and super().leads(module, args[0]) else None
            argument = lesson.arguments.get(id(args[0])) if len(args) == 1 and not kwargs else None
            known = tag is not None and len(args) == 1 and not kwargs and (args[0].grad_fn is not None or argument is not None)
            stop = Stop(module, tag.axis, tag.rows == 1, True, argument, None) if known and tag is not None else None
            lesson.add(Named(name, module), stop, self._given(args), self._tags(output))
        return new_output

    def _follow(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        lesson = self._lesson
        if lesson is None:
            return super()._follow(func, args, kwargs)
        self.batch.moved = False
        out = super()._follow(func, args, kwargs)
        if self.batch.moved and lesson.bodies:
            lesson.moving.add(lesson.bodies[-1])
            lesson.add(Named(getattr(func, "__name__", str(func)), func), None)
        elif func in RESHAPES and out.grad_fn is not None and not any(x is out for x in (*args, *kwargs.values())):
            tag = self.batch[out]
            if isinstance(tag, Blocks):
                lesson.reshapes[out.grad_fn] = tag.axis
        return out

    def _as_stop(self, call: Call, tensors: list[Tensor]) -> Stop | None:
        """The call as a stop of a route; None where its body has to be followed."""
        lesson, layer = self._lesson, call.fn
        assert lesson is not None
        if not isinstance(layer, nn.Module) or layer_kind(layer) is None or set(call.outputs) != {0}:
            return None
        tag, entry = call.outputs[0], self.batch[tensors[0]] if len(tensors) == 1 else None
        if isinstance(tag, Rows) or not isinstance(entry, Blocks):
            return None
        if len(call._leaves) != 1 or isinstance(call._leaves[0], nn.Parameter):
            return None
        argument = lesson.arguments.get(id(tensors[0]))
        if tensors[0].grad_fn is None and argument is None:
            return None  # made where no graph shows how
        return Stop(layer, tag[0], tag[1] == 1, entry.axis == 0, argument, call.without_tensors())

    def _given(self, arguments: Any) -> Given:
        """Where samples are in the leaves of what a module is called with."""
        found: list[tuple[int, Blocks | str]] = []
        for i, x in enumerate(leaves_of(arguments)):
            if not isinstance(x, Tensor):
                continue
            tag = self.batch[x]
            if self.batch.lost(x):
                found.append((i, "lost"))
            elif tag is not None:
                found.append((i, _some(tag) if isinstance(tag, Blocks) else "in any order"))
        return tuple(found)

    def _tags(self, output: Any) -> Places | None:
        """Where samples are in the leaves of a module's output; None where no route can tell."""
        found = []
        for i, x in enumerate(leaves_of(output)):
            if not isinstance(x, Tensor):
                continue
            tag = self.batch[x]
            if self.batch.lost(x) or self._is_source(x) or isinstance(tag, Rows):
                return None
            if tag is not None:
                found.append((i, _some(tag)))
        return tuple(found)

    # a step on its route

    @unseen
    def _enter_part(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        route = self._route
        if route is None or not self.in_forward:
            return
        if self.batch.moved and self._part < len(route.parts):
            part, given, _ = route.parts[self._part]
            if part is module and given != self._given((args, kwargs)):
                self._deviate(f"{type(module).__name__} was given the samples in another way")
                return
        self.mode.remove()

    @unseen
    def _leave_part(self, module: nn.Module, args: tuple, output: Any) -> None:
        route = self._route
        if route is None or not self.in_forward:
            return
        if self._part >= len(route.parts) or route.parts[self._part][0] is not module:
            self._deviate(f"{type(module).__name__} ran out of order")
            return
        tags = route.parts[self._part][2]
        self._part += 1
        leaves = [output] if isinstance(output, Tensor) else leaves_of(output) if tags else []
        for i, (axis, rows, tokens) in tags:
            x = leaves[i] if i < len(leaves) else None
            size = x.shape[axis] if isinstance(x, Tensor) and axis < x.ndim else -1
            if not isinstance(x, Tensor) or size < 0 or size % self.batch.n or (rows == 1 and size != self.batch.n):
                self._deviate(f"{type(module).__name__} returned other sizes")
                return
            self.batch.tag(x, Blocks(axis, size // self.batch.n, tokens))
        if self._part < len(route.parts) or self._heard < route.heard:
            self.mode.__enter__()

    def next_stop(self, layer: nn.Module) -> Stop | None:
        """The stop that a call of ``layer`` is at, on the route."""
        route = self._route
        stop = None if route is None or self._stop >= len(route.stops) else route.stops[self._stop]
        return stop if stop is not None and stop.layer is layer else None

    def leads(self, layer: nn.Module, x: Tensor) -> bool:
        if self._route is not None and self.in_forward:
            stop = self.next_stop(layer)
            if stop is not None:
                n = self.batch.n
                return stop.led and stop.template is None and (len(x) == n if stop.single else len(x) % n == 0)
            if layer not in self._route.inside:
                return False
        return super().leads(layer, x)

    def _pass(self, layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A layer on the route has run. In one piece: this is what a step on its route pays for every layer."""
        route, place = self._route, self._stop
        if route is None or not self.open or _in_backward():
            return
        if place >= len(route.stops) or route.stops[place].layer is not layer or len(args) + len(kwargs) != 1:
            self._deviate(f"{type(layer).__name__} ran out of order")
            return
        self._stop = place + 1
        _, axis, single, _, argument, template, direct = route.stops[place]
        x = args[0] if args else next(iter(kwargs.values()))
        known = x.grad_fn is not None if argument is None else x is self._arguments[argument]
        n, shape = self.batch.n, output.shape
        size = shape[axis] if axis < len(shape) else -1
        if not known or size % n or size <= 0 or (single and size != n):
            self._deviate(f"{type(layer).__name__} was called in another way")
            return
        scored, self.scored = self.scored, False
        if (template is None) != scored:
            self._deviate(f"{type(layer).__name__} was scored in another way")
            return
        if template is not None:
            recording = self._into
            outputs = template.outputs
            if outputs.get(0) != (axis, size // n):  # the sizes of the last step do, nearly always
                outputs = template.outputs = {0: (axis, size // n)}
            call = Again(template, x, self.names, outputs)
            watched = call.await_gradient(0, output, None if direct else (x,), self._receive)
            if recording.outputs is not None:
                recording.awaits(watched)


def _nowhere(call: Call, index: int, grad: Tensor) -> None:
    pass


def _some(tag: Blocks) -> Blocks:
    """The tag, in which of several rows any number may vary."""
    return tag if tag.rows == 1 else tag._replace(rows=-1)


def recorder_of(model: nn.Module, alone: bool, tree: Tree) -> Recorder:
    """One that learns. Where several processes train the model all steps are followed: one that left its route in one process would
    have no scores there, and others in the rest.
    """
    return LearningRecorder(model, tree) if alone else Recorder(model, tree)
