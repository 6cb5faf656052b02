"""Several optimizers that share the parameters out, as one: each is asked for its own."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.optim.protocol import Adjoint, Kept, Linearized, OptState

_ABSENT = torch.empty(0)  # in an adjoint, where an optimizer keeps fewer kinds of state than another


class _Part(NamedTuple):
    """One optimizer's part of a list of parameters."""

    state: OptState
    places: list[int]  # in the list

    def of(self, entries: Sequence[Any]) -> list[Any]:
        return [entries[i] for i in self.places]


class Several:
    """The steps of several optimizers, taken together, as functions of the gradients.

    A rule that all of them know is each one's own; their exact linearizations, where these have different names, are ``exact``.
    """

    linearizations: tuple[str, ...]
    not_carried: str | None
    not_foreseen: str | None

    def __init__(self, states: Sequence[OptState], order: Sequence[Tensor] | None = None):
        """``order``: that of ``parameters()``; otherwise one optimizer's after another's.

        Raises ValueError where two hold the same parameter.
        """
        self.states = list(states)
        self._owner: dict[Tensor, int] = {}
        for i, state in enumerate(self.states):
            for p in state.parameters():
                if (other := self._owner.setdefault(p, i)) != i:
                    raise ValueError(f"optimizers {other} and {i} hold the same parameter, of shape {list(p.shape)}")
        self._order = list(self._owner) if order is None else list(order)
        firsts = {state.linearizations[0] for state in self.states}
        known = [rule for rule in self.states[0].linearizations if all(rule in s.linearizations for s in self.states)]
        self.linearizations = tuple(known) if len(firsts) == 1 else ("exact", *known)
        self.not_carried = next((state.not_carried for state in self.states if state.not_carried), None)
        self.not_foreseen = next((state.not_foreseen for state in self.states if state.not_foreseen), None)

    def __contains__(self, p: Tensor) -> bool:
        return p in self._owner

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._order)

    def _of(self, p: Tensor) -> OptState:
        return self.states[self._owner[p]]

    def _parts(self, params: Sequence[Tensor]) -> list[_Part]:
        """Those of the optimizers that hold some of ``params``, in the optimizers' order."""
        places: list[list[int]] = [[] for _ in self.states]
        for i, p in enumerate(params):
            places[self._owner[p]].append(i)
        return [_Part(state, found) for state, found in zip(self.states, places, strict=True) if found]

    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        for part in self._parts(params):
            points = {"empty": empty and part.of(empty), "mid": mid and part.of(mid)}
            part.state.weight_points(part.of(params), part.of(grads), **points)

    def linearize(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]
    ) -> Linearized:
        history = total = None
        for part in self._parts(params):
            own = part.state.linearizations[0] if rule == self.linearizations[0] else rule
            found = part.state.linearize(part.of(params), part.of(grads), part.of(val_grads), own, part.of(out))
            for i, P in zip(part.places, found.P, strict=True):
                out[i] = P
            history = found.history if history is None else history + found.history
            total = found.total if total is None else total + found.total
        assert history is not None and total is not None
        return Linearized(out, history, total)

    def weights(self, p: Tensor, g: Tensor) -> Tensor:
        return self._of(p).weights(p, g)

    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        return self._of(p).metric(p, g)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        return self._of(p).expected_gradient(p)

    def steps_taken(self, default: int) -> int:
        """The shortest history of those that have one: an optimizer that never had a gradient keeps nobody waiting."""
        return min((n for n in (state.steps_taken(default) for state in self.states) if n > 0), default=0)

    def scalars(self, params: Sequence[Tensor]) -> list[Any]:
        return [part.state.scalars(part.of(params)) for part in self._parts(params)]

    def kept(self, params: Sequence[Tensor]) -> Kept:
        parts = self._parts(params)
        held = [part.state.kept(part.of(params)) for part in parts]
        widths = [len(h.tensors) // len(part.places) for h, part in zip(held, parts, strict=True)]
        # as many for every parameter: None where its optimizer keeps fewer
        rows: list[list[Tensor | None]] = [[None] * max(widths, default=0) for _ in params]
        for part, h, width in zip(parts, held, widths, strict=True):
            for j, i in enumerate(part.places):
                rows[i][:width] = h.tensors[j * width : (j + 1) * width]

        def rebuild(tensors: list[Tensor | None]) -> Several:
            each = max(widths, default=0)
            states = []
            for part, h, width in zip(parts, held, widths, strict=True):
                own = chain.from_iterable(tensors[i * each : i * each + width] for i in part.places)
                states.append(h.rebuild(list(own)))
            return _in_places(states, parts, len(params))

        return Kept(list(chain.from_iterable(rows)), rebuild)

    def advanced(self, grads: Sequence[Tensor | None], scalars: list[Any]) -> "Several":
        parts = self._parts(self._order)
        states = [part.state.advanced(part.of(grads), own) for part, own in zip(parts, scalars, strict=True)]
        return _in_places(states, parts, len(self._order))

    def adjoint(self, val_grads: Sequence[Tensor]) -> Adjoint:
        parts = self._parts(self._order)
        own = [part.state.adjoint(part.of(val_grads)) for part in parts]
        kinds = max(len(adjoint.state) for adjoint in own)
        state = [[_ABSENT] * len(val_grads) for _ in range(kinds)]
        for part, adjoint in zip(parts, own, strict=True):
            for kind, entries in zip(state, adjoint.state, strict=False):
                for i, x in zip(part.places, entries, strict=True):
                    kind[i] = x
        return Adjoint(list(val_grads), state)

    def pull(self, grads: Sequence[Tensor | None], after: Adjoint, shares: Sequence[Tensor] | None = None) -> list[Tensor]:
        found: list[Tensor] = [torch.empty(0)] * len(self._order)
        for part in self._parts(self._order):
            own = [part.of(kind) for kind in after.state if kind[part.places[0]] is not _ABSENT]
            pulled = part.state.pull(part.of(grads), Adjoint(part.of(after.weights), own), shares and part.of(shares))
            for i, x in zip(part.places, pulled, strict=True):
                found[i] = x
        return found


def _in_places(states: Sequence[OptState], parts: Sequence[_Part], n: int) -> Several:
    """New states of the parts' optimizers, whose parameters take the places of those that they stand for."""
    order: list[Tensor] = [torch.empty(0)] * n
    for state, part in zip(states, parts, strict=True):
        for i, p in zip(part.places, state.parameters(), strict=True):
            order[i] = p
    return Several(states, order)
