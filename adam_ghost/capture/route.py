"""What the steps of a kind do, and how it is found from what was seen of one that was followed."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from adam_ghost.capture.batch import Blocks
from adam_ghost.capture.calls import Call


class Stop(NamedTuple):
    """One call of a layer on a route."""

    layer: nn.Module
    axis: int  # of the samples in its output
    single: bool  # whether that has one row per sample, or several
    led: bool  # whether the samples lead its input
    argument: int | None  # of the model's argument leaves, which one is its input; None: the graph shows where that comes from
    template: Call | None  # None: the layer takes care of its own scores
    direct: bool = False  # whether the graph leads through its output as it is, which nobody writes to


Places: TypeAlias = tuple[tuple[int, Blocks], ...]  # which leaves of a module's output carry samples, and their tags
Given: TypeAlias = tuple[tuple[int, Blocks | str], ...]  # the same of its arguments, in any order and lost ones too


class Route(NamedTuple):
    """What steps of a kind do."""

    stops: tuple[Stop, ...]
    followed: frozenset[nn.Module]  # modules whose own body is followed
    inside: Mapping[nn.Module, str]  # layers called by these that are no stops, and their names
    # all else that is called by these, and where samples are in what they are given and in their outputs
    parts: tuple[tuple[nn.Module, Given, Places], ...]
    heard: int  # calls in these bodies that are no stops: after the last one nothing has to be followed any more
    graph: tuple[Any, ...]
    reshapes: tuple[tuple[int, int], ...]  # nodes of the graph, and the dimension of the samples that they reshape

    def same(self, other: "Route") -> bool:
        bare = [[stop._replace(template=None) for stop in route.stops] for route in (self, other)]
        return bare[0] == bare[1] and self[1:] == other[1:]


class Named(NamedTuple):
    """A layer, or a function, that was called."""

    name: str
    fn: Any


class Lesson:
    """What is seen of one followed step."""

    def __init__(self, kind: Hashable, arguments: list[Any]):
        self.kind = kind
        self.arguments = {id(x): i for i, x in enumerate(arguments) if isinstance(x, Tensor)}
        self.bodies: list[nn.Module] = []  # those running now, from the model's down
        self.calls: list[tuple[list[nn.Module], Stop | None, Named]] = []  # bodies, the stop, what was called
        self.made: list[Any] = []  # by these, the node of the output
        self.given: list[Given] = []  # what each of these was called with
        # how many calls came before, bodies, what they called, stops too
        self.exits: list[tuple[int, list[nn.Module], nn.Module, Given, Places]] = []
        self.moving: set[nn.Module] = set()  # bodies in which values decided where samples go
        self.reshapes: dict[Any, int] = {}  # nodes of the graph, and the dimension of the samples that they reshape
        self.route: Route | None = None
        self.void = False  # whether something happened that no route foresees

    def end(self, graph: tuple[Any, ...], nodes: Sequence[Any], names: Mapping[Tensor, str]) -> None:
        """The model's forward pass is over: finds the bodies to be followed, with all those around them.

        There is no route where the graph behind the outputs does not show all that is to be verified.
        """
        places = {node: i for i, node in enumerate(nodes)}
        if not self.reshapes.keys() <= places.keys():
            return
        reshapes = tuple(sorted((places[node], axis) for node, axis in self.reshapes.items()))
        followed = {body for bodies, stop, _ in self.calls if stop is None for body in bodies}
        inside = {call.fn: call.name for _, stop, call in self.calls if stop is None and isinstance(call.fn, nn.Module)}
        stops = tuple(
            stop._replace(direct=node in places)
            for (_, stop, _), node in zip(self.calls, self.made, strict=True)
            if stop is not None
        )
        if not {names[p] for stop in stops for p in stop.layer.parameters() if p in names} <= set(graph):
            return
        last = max((i for i, (_, stop, _) in enumerate(self.calls) if stop is None), default=-1)
        exits = [exit for exit in self.exits if exit[1][-1] in followed and exit[2] not in followed]
        # with the first one after the last call nothing is followed any more; unless the order of the samples is looked at
        needed = len(exits) if self.moving else sum(exit[0] <= last for exit in exits) + 1
        if not {exit[2] for exit in exits[:needed]}.isdisjoint(exit[2] for exit in exits[needed:]):
            needed = len(exits)
        parts = tuple(exit[2:] for exit in exits[:needed])
        elsewhere = {part for _, bodies, part, *_ in self.exits if bodies[-1] not in followed}
        apart = inside.keys().isdisjoint(stop.layer for stop in stops) and elsewhere.isdisjoint(
            {part for part, *_ in parts} | followed
        )
        pays = any(stop is not None and bodies[-1] not in followed for bodies, stop, _ in self.calls)
        if apart and pays:
            heard = sum(stop is None for _, stop, _ in self.calls)
            self.route = Route(stops, frozenset(followed), inside, parts, heard, graph, reshapes)

    def add(
        self, called: Named, stop: Stop | None, given: Given = (), places: Places | None = None, output: Tensor | None = None
    ) -> None:
        """A call of a layer, or of a function that met parameters or moves samples; None where no stop tells what it does."""
        bodies = list(self.bodies)
        stop = stop if self.moving.isdisjoint(bodies) and places is not None else None
        self.calls.append((bodies, stop, called))
        self.made.append(None if output is None else output.grad_fn)
        if stop is not None and places is not None:
            self.exits.append((len(self.calls), bodies, stop.layer, given, places))
