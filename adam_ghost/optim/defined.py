"""Optimizers by their definition: one function of one parameter's weights, gradient and state, and all else follows.

Run on tensors the definition is the step; run on a ``Chord`` its exact secant; through ``torch.func.vjp`` its adjoint. Plain
PyTorch, one parameter after another, on any device.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from adam_ghost.optim import one_pass
from adam_ghost.optim.chord import Chord
from adam_ghost.optim.protocol import Adjoint, Kept, Linearized

# the 16-point Gauss-Legendre rule on [0, 1]: where, and how much. With four points Muon's error is some hundredths
_GAUSS = tuple(((1 + x) / 2, weight / 2) for x, weight in zip(*(v.tolist() for v in leggauss(16)), strict=True))


class Row(NamedTuple):
    """One parameter before its next step."""

    param: Tensor
    scalars: Any  # a NamedTuple of floats and 0-D tensors, with ``lr`` and ``maximize``
    state: tuple[Tensor | None, ...]  # None: none yet


class Defined:
    """What an optimizer will do to any gradient, by its ``moved``; see ``protocol.OptState``.

    A kind of optimizer is a subclass with ``moved``, ``read``, ``kinds`` and, for ``lookahead``, ``expected_gradient``.
    """

    linearizations: tuple[str, ...]
    kinds: ClassVar[int]  # of state tensors per parameter
    not_carried: str | None = None
    not_foreseen: str | None = None

    # (scalars, weights w, gradient x, *state) -> what the step subtracts from w, and the state after it. ``x`` points downhill
    # (negated under maximize); all tensors are at least float32, and none is written to
    moved: ClassVar[Callable[..., tuple]]

    @classmethod
    def smooth(cls, s: Any, w: Tensor, x: Tensor, *state: Tensor) -> tuple:
        """``moved``, as far as it can be differentiated."""
        return cls.moved(s, w, x, *state)

    @staticmethod
    def bounded(s: Any, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The state with second moments of at least what one sample's ``share`` ``[]`` of an element's gradient makes of them."""
        return state

    @staticmethod
    def read(group: Mapping[str, Any], held: Mapping[str, Any]) -> tuple[Any, tuple[Tensor | None, ...]]:
        """Scalars and state of a parameter's next step, from its group and what the optimizer holds of it."""
        raise NotImplementedError

    @classmethod
    def blank(cls, w: Tensor) -> tuple[Tensor, ...]:
        """The state before a parameter's first step."""
        return (torch.zeros_like(w),) * cls.kinds

    def __init__(self, rows: Iterable[Row]):
        self._rows = {row.param: row for row in rows}

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> "Defined":
        """From an optimizer about to step; copies nothing."""
        return cls.of_groups(optimizer, optimizer.param_groups)

    @classmethod
    def of_groups(cls, optimizer: torch.optim.Optimizer, groups: Iterable[Mapping[str, Any]]) -> "Defined":
        """From some of an optimizer's groups."""
        return cls(Row(p, *cls.read(group, optimizer.state.get(p, {}))) for group in groups for p in group["params"])

    def __contains__(self, p: Tensor) -> bool:
        return p in self._rows

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._rows)

    # one parameter

    def _wide(self, row: Row) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Weights and state in at least float32."""
        w = row.param.detach()
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        if any(x is None for x in row.state):
            row = row._replace(state=tuple(b if x is None else x for x, b in zip(row.state, self.blank(w), strict=True)))
        return w, tuple(x.to(w.dtype) for x in row.state if x is not None)

    def _downhill(self, row: Row, g: Tensor | None, w: Tensor) -> Tensor:
        if g is None:
            return torch.zeros_like(w)
        return -g.to(w.dtype) if row.scalars.maximize else g.to(w.dtype)

    def _moved(self, p: Tensor, g: Tensor | None) -> Tensor:
        row = self._rows[p]
        w, state = self._wide(row)
        return self.moved(row.scalars, w, self._downhill(row, g, w), *state)[0]

    @torch.no_grad()
    def weights(self, p: Tensor, g: Tensor) -> Tensor:
        return self._wide(self._rows[p])[0] - self._moved(p, g)

    @torch.no_grad()
    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            w, alone = self._wide(self._rows[p])[0], self._moved(p, None)
            half = (alone + self._moved(p, g)) / 2 if mid else alone
            for out, moved in ((empty, alone), (mid, half)):
                if out:
                    out[i].copy_(w - moved)

    # linearized

    def _slopes(self, row: Row, w: Tensor, x: Tensor, state: Sequence[Tensor], val: Tensor, rule: str) -> Tensor:
        """``val`` ``[*shape]`` or ``[K, *shape]`` times the derivative of what is moved by ``x``, by ``rule``."""
        raise NotImplementedError

    @torch.no_grad()
    def linearize(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]
    ) -> Linearized:
        if rule not in self.linearizations:
            raise ValueError(f"rule must be one of {', '.join(self.linearizations)}, got {rule!r}")
        history, total = [], []
        for p, g, val, P in zip(params, grads, val_grads, out, strict=True):
            row = self._rows[p]
            w, state = self._wide(row)
            x, lead = self._downhill(row, g, w), val.ndim - w.ndim
            val = val.to(w.dtype)
            moved = self._moved(p, None)
            history.append(_sum_after(lead, val * moved))
            found = val * row.scalars.lr if rule == "sgd" else self._slopes(row, w, x, state, val, rule)
            P.copy_(-found if row.scalars.maximize else found)
            total.append(_sum_after(lead, P * (0 if g is None else g.to(P.dtype))))
        sums = (torch.stack(x).sum(0).to(out[0].dtype) for x in (history, total))
        return Linearized(out, *sums)

    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        raise TypeError(f"the step of {type(self).__name__} couples the elements of a parameter: it has no elementwise scaling")

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        return None

    def steps_taken(self, default: int) -> int:
        """``default`` too where the optimizer does not count its steps."""
        started = [row.scalars for row in self._rows.values() if self.kinds == 0 or any(x is not None for x in row.state)]
        counts = [getattr(s, "t", None) for s in started]
        return max((default if t is None or isinstance(t, Tensor) else int(t) - 1 for t in counts), default=0)

    # several steps

    def scalars(self, params: Sequence[Tensor]) -> list[Any]:
        return [self._rows[p].scalars for p in params]

    def kept(self, params: Sequence[Tensor]) -> Kept:
        rows = [self._rows[p] for p in params]
        each = 1 + self.kinds

        def rebuild(tensors: list[Tensor | None]) -> "Defined":
            found = []
            for i, row in enumerate(rows):
                p, *state = tensors[each * i : each * (i + 1)]
                assert p is not None
                found.append(Row(p, row.scalars, tuple(state)))
            return type(self)(found)

        held = chain.from_iterable((row.param, *row.state) for row in rows)
        return Kept([None if x is None else x.detach().clone() for x in held], rebuild)

    @torch.no_grad()
    def advanced(self, grads: Sequence[Tensor | None], scalars: list[Any]) -> "Defined":
        after = []
        for row, g, then in zip(self._rows.values(), grads, scalars, strict=True):
            if g is None:
                after.append(Row(row.param.clone(), then, row.state))
                continue
            w, state = self._wide(row)
            moved, *new = self.moved(row.scalars, w, self._downhill(row, g, w), *state)
            dtypes = [row.param.dtype if x is None else x.dtype for x in row.state]
            after.append(Row((w - moved).to(row.param.dtype), then, tuple(x.to(t) for x, t in zip(new, dtypes, strict=True))))
        return type(self)(after)

    def adjoint(self, val_grads: Sequence[Tensor]) -> Adjoint:
        kinds: list[list[Tensor]] = [[] for _ in range(self.kinds)]
        for p, val in zip(self._rows, val_grads, strict=True):
            lead = val.shape[: val.ndim - p.ndim]
            for kind, like in zip(kinds, self.blank(p.detach()), strict=True):
                kind.append(val.new_zeros((*lead, *like.shape)))
        return Adjoint(list(val_grads), kinds)

    def pull(self, grads: Sequence[Tensor | None], after: Adjoint, shares: Sequence[Tensor] | None = None) -> list[Tensor]:
        found = [torch.zeros_like(x) for x in after.weights]
        for i, (row, g) in enumerate(zip(self._rows.values(), grads, strict=True)):
            if g is None:  # it stays where it is, and so does its state
                continue
            s = row.scalars

            def step(w: Tensor, g: Tensor, *state: Tensor, s: Any = s) -> tuple[Tensor, ...]:
                by, *new = self.smooth(s, w, -g if s.maximize else g, *state)
                return (w - by, *new)

            w, state = self._wide(row)
            if shares is not None:
                state = self.bounded(s, g.to(w.dtype), shares[i].to(w.dtype), state)
            lambdas = [after.weights[i], *(kind[i] for kind in after.state)]
            with torch.enable_grad():
                _, pull, *_ = torch.func.vjp(step, w, g.to(w.dtype), *state)
            pull = torch.func.vmap(pull) if lambdas[0].ndim > w.ndim else pull
            to_w, to_g, *to_state = pull(tuple(x.to(w.dtype) for x in lambdas))
            for target, value in zip((*lambdas, found[i]), (to_w, *to_state, to_g), strict=True):
                target.copy_(value)
        return found


class Elementwise(Defined):
    """An optimizer that steps each element by that element's gradient and state alone.

    With ``slots`` and ``coefficients`` its directions and weights are formed in one compiled pass over memory, in float32; in
    float64, and where the extension is not there, by its definition.
    """

    linearizations: tuple[str, ...] = ("secant", "tangent", "sgd")
    slots: ClassVar[one_pass.Slots | None] = None  # which state tensors are m, v and z of one_pass

    @staticmethod
    def coefficients(s: Any) -> one_pass.Coefficients:
        """What ``moved`` is in one_pass's form."""
        raise NotImplementedError

    def _compiled(self, params: Sequence[Tensor]) -> tuple[list[Tensor], one_pass.States, list[one_pass.Coefficients]] | None:
        """The parameters, states and steps as the one-pass op takes them; None: it has no such step or dtype."""
        if self.slots is None or any(p.dtype not in (torch.float32, torch.bfloat16) for p in params):
            return None
        rows = [self._rows[p] for p in params]
        m, v, z = ([None if i is None else self.held(row, i) for row in rows] for i in self.slots)
        known: dict[Any, one_pass.Coefficients] = {}
        for row in rows:
            if row.scalars not in known:
                known[row.scalars] = self.coefficients(row.scalars)
        return [row.param.detach() for row in rows], (m, v, z), [known[row.scalars] for row in rows]

    @staticmethod
    def held(row: Row, i: int) -> Tensor | None:
        """A row's state tensor; None: zeros."""
        return row.state[i]

    @torch.no_grad()
    def linearize(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]
    ) -> Linearized:
        if rule in self.linearizations and (given := self._compiled(params)):
            weights, states, steps = given
            sums = one_pass.variance_correction(weights, list(grads), states, list(val_grads), steps, rule, out)
            if sums is not None:
                total = sums.total()
                return Linearized(out, total.history.to(out[0].dtype), total.reached.to(out[0].dtype))
        return super().linearize(params, grads, val_grads, rule, out)

    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        given = self._compiled(params)
        if given is None or not one_pass.weight_points(given[0], list(grads), *given[1:], empty, mid):
            super().weight_points(params, grads, empty=empty, mid=mid)

    def _slopes(self, row: Row, w: Tensor, x: Tensor, state: Sequence[Tensor], val: Tensor, rule: str) -> Tensor:
        start = torch.zeros_like(x) if rule == "secant" else x
        return val * self.moved(row.scalars, w, Chord(start, x, torch.ones_like(x)), *state)[0].slope

    @torch.no_grad()
    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        row = self._rows[p]
        w, state = self._wide(row)
        return self._slopes(row, w, self._downhill(row, g, w), state, torch.ones_like(w), "secant")


class Coupled(Defined):
    """An optimizer whose step couples the elements of a parameter: no diagonal is its secant.

    The integral of its derivative along the gradient's path is taken by 16 Gauss points, each a vector-Jacobian product.
    """

    linearizations: tuple[str, ...] = ("path", "tangent", "sgd")

    def _slopes(self, row: Row, w: Tensor, x: Tensor, state: Sequence[Tensor], val: Tensor, rule: str) -> Tensor:
        found = torch.zeros_like(val)
        for at, weight in _GAUSS if rule == "path" else ((1.0, 1.0),):
            with torch.enable_grad():
                _, pull, *_ = torch.func.vjp(lambda x: self.smooth(row.scalars, w, x, *state)[0], at * x)
            pull = torch.func.vmap(pull) if val.ndim > w.ndim else pull
            found += weight * pull(val)[0]
        return found


def _sum_after(lead: int, x: Tensor) -> Tensor:
    """``x`` summed over all but the first ``lead`` dimensions, in float64; there may be no others."""
    return x.unsqueeze(-1).flatten(lead).sum(-1, dtype=torch.float64).reshape(-1)
