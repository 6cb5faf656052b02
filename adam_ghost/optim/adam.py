"""Adam and AdamW: a ``torch.optim.Adam`` or ``AdamW`` read as what it is to one step; copies nothing."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from operator import methodcaller
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim.adam import adam

from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import RULES, StepScalars
from adam_ghost.optim.history import raised
from adam_ghost.optim.protocol import Adjoint, Kept, Linearized, number, register
from adam_ghost.same import same


class ParamState(NamedTuple):
    """One parameter with the optimizer's state before its next step; ``None`` where there is no state yet (zeros)."""

    param: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    max_exp_avg_sq: Tensor | None
    scalars: StepScalars

    @property
    def moments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq


class _Columns(NamedTuple):
    """What a state has of its parameters, one entry to each; shared by the states of one optimizer's steps."""

    params: list[Tensor]
    exp_avgs: list[Tensor | None]
    exp_avg_sqs: list[Tensor | None]
    max_exp_avg_sqs: list[Tensor | None]
    places: dict[Tensor, int]  # in these lists, of the optimizer's parameters

    @classmethod
    def of(cls, params: list[Tensor], *moments: list[Any]) -> "_Columns":
        """This process's parts of ``params`` and their moments, where they are spread over several."""
        places = {p: i for i, p in enumerate(params)}
        own, m, v, v_max = ([local_part(x) for x in column] for column in (params, *moments))
        return cls(own, m, v, v_max, places)


class AdamState:
    """The fixed state of one step's game: what Adam will do to any gradient, without doing it.

    Built from an optimizer by ``AdamState.of``, or from ``ParamState`` rows. Every method is a pure function of one
    parameter ``p`` held by the state and a gradient ``g`` of its shape; results are in at least float32.
    """

    linearizations: tuple[str, ...] = RULES
    not_carried: str | None = None
    not_foreseen: str | None = None

    def __init__(self, params: Iterable[ParamState]):
        rows = {row.param: row for row in params}
        moments = ([row.moments[i] for row in rows.values()] for i in range(3))
        self._set(_Columns.of([*rows], *moments), [row.scalars for row in rows.values()])

    def _set(self, columns: _Columns, scalars: list[StepScalars]) -> None:
        self._columns, self._scalars = columns, scalars

    @classmethod
    def of(cls, opt_state: "torch.optim.Optimizer | AdamState") -> "AdamState":
        """From a ``torch.optim.Adam`` / ``AdamW`` about to step, in any of their implementations; an AdamState is returned as is.

        Raises TypeError for any other optimizer, also for subclasses that step differently.
        """
        if isinstance(opt_state, AdamState):
            return opt_state
        step = getattr(type(opt_state), "step", None)
        # step is wrapped anew in each class by the optimizer's profiling hooks: compare what they wrap
        if step is None or inspect.unwrap(step) is not inspect.unwrap(torch.optim.Adam.step):
            raise TypeError(
                f"opt_state must be a torch.optim.Adam, torch.optim.AdamW or adam_ghost.AdamState, got {type(opt_state).__name__}"
            )
        return cls.of_groups(opt_state, opt_state.param_groups, decoupled=isinstance(opt_state, torch.optim.AdamW))

    @classmethod
    def of_groups(cls, optimizer: torch.optim.Optimizer, groups: Iterable[Mapping[str, Any]], decoupled: bool) -> "AdamState":
        """From those groups of an optimizer that it steps as Adam does; ``decoupled``: with AdamW's decay, if they do not say.

        Of parameters that are spread over processes it has this process's parts.
        """
        groups = list(groups)
        held = _held_by(optimizer, [p for group in groups for p in group["params"]])
        times = iter(_times(held.steps))
        scalars = [s for group in groups for s in _scalars(group, decoupled, [*islice(times, len(group["params"]))])]
        made = cls(())
        made._set(held.columns, scalars)
        return made

    def __contains__(self, p: Tensor) -> bool:
        return p in self._columns.places

    def __getitem__(self, p: Tensor) -> ParamState:
        i = self._columns.places[p]
        params, m, v, v_max, _ = self._columns
        return ParamState(params[i], m[i], v[i], v_max[i], self._scalars[i])

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._columns.places)

    def lists(self, params: Sequence[Tensor]) -> tuple[list, list, list, list]:
        """``exp_avgs``, ``exp_avg_sqs``, ``max_exp_avg_sqs`` and scalars of ``params``, as the ops take them."""
        return self._lists(params)[1:]

    def _lists(self, params: Sequence[Tensor]) -> tuple[list, list, list, list, list]:
        """This process's parts of ``params``, and their ``lists``."""
        own, m, v, v_max, held = self._columns
        if same(params, [*held]):
            return own, m, v, v_max, self._scalars
        places = [held[p] for p in params]
        pick = lambda column: [column[i] for i in places]  # noqa: E731
        return pick(own), pick(m), pick(v), pick(v_max), pick(self._scalars)

    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        own, *state = self._lists(params)
        adam_op.weight_points(own, list(grads), *state, empty=empty, mid=mid)

    def linearize(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        val_grads: Sequence[Tensor],
        rule: str,
        out: list[Tensor],
    ) -> Linearized:
        return self._linearize(params, grads, val_grads, rule, out, foreseen=False)

    def _linearize(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        val_grads: Sequence[Tensor],
        rule: str,
        out: list[Tensor],
        foreseen: bool,
    ) -> Linearized:
        own, m, v, v_max, steps = self._lists(params)
        state = own, list(grads), m, v, v_max
        P, sums = adam_op.variance_correction(*state, list(val_grads), steps, rule=rule, foreseen=foreseen, out=out)
        sums, dtype = sums.total(), torch.promote_types(out[0].dtype, torch.float32)
        return Linearized(P, sums.history.to(dtype), sums.reached.to(dtype))

    def linearize_expected(self, params: Sequence[Tensor], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]) -> Linearized:
        return self._linearize(params, [None] * len(params), val_grads, rule, out, foreseen=True)

    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        return self.scaling(p, g) * self[p].scalars.lr

    def steps_taken(self, default: int) -> int:
        started = {s.t for m, s in zip(self._columns.exp_avgs, self._scalars, strict=True) if m is not None}
        return max((default if isinstance(t, Tensor) else int(t) - 1 for t in started), default=0)

    def scalars(self, params: Sequence[Tensor]) -> list[StepScalars]:
        return [self[p].scalars for p in params]

    def kept(self, params: Sequence[Tensor]) -> Kept:
        rows = [self[p] for p in params]
        scalars = [row.scalars for row in rows]

        def rebuild(tensors: list[Tensor | None]) -> AdamState:
            rows = []
            for i, s in enumerate(scalars):
                p, m, v, v_max = tensors[4 * i : 4 * i + 4]
                assert p is not None
                rows.append(ParamState(p, m, v, v_max, s))
            return AdamState(rows)

        return Kept([None if x is None else x.detach().clone() for row in rows for x in row[:4]], rebuild)

    def advanced(self, grads: Sequence[Tensor | None], scalars: list[StepScalars]) -> "AdamState":
        tensors, rebuild = self.kept(list(self.parameters()))
        copied = rebuild(tensors)
        assert isinstance(copied, AdamState)
        rows = [copied[p] for p in copied.parameters()]
        alike: dict[StepScalars, list[int]] = {}
        for i, (row, g) in enumerate(zip(rows, grads, strict=True)):
            if g is not None:
                alike.setdefault(row.scalars, []).append(i)
        for s, members in alike.items():
            ws = [rows[i].param for i in members]
            ms: list[Tensor] = []
            vs: list[Tensor] = []
            v_maxs: list[Tensor] = []
            for i, w in zip(members, ws, strict=True):
                m, v, v_max = rows[i].moments
                # as the optimizer does before a parameter's first step
                ms.append(torch.zeros_like(w) if m is None else m)
                vs.append(torch.zeros_like(w) if v is None else v)
                if s.amsgrad:
                    v_max = torch.zeros_like(w) if v_max is None else v_max
                    v_maxs.append(v_max)
                rows[i] = ParamState(w, ms[-1], vs[-1], v_max, s)
            # the optimizer's own arithmetic: the weights come out to its bits
            adam(
                ws,
                [g for i in members if (g := grads[i]) is not None],
                ms,
                vs,
                v_maxs,
                [torch.tensor(float(s.t) - 1.0) for _ in members],
                amsgrad=s.amsgrad,
                beta1=s.beta1,
                beta2=s.beta2,
                lr=s.lr,
                weight_decay=s.weight_decay,
                eps=s.eps,
                maximize=s.maximize,
                decoupled_weight_decay=s.decoupled,
            )
        return AdamState(row._replace(scalars=s) for row, s in zip(rows, scalars, strict=True))

    def adjoint(self, val_grads: Sequence[Tensor]) -> Adjoint:
        kinds = 3 if any(s.amsgrad for s in self._scalars) else 2
        return Adjoint(list(val_grads), [[torch.zeros_like(x) for x in val_grads] for _ in range(kinds)])

    def pull(self, grads: Sequence[Tensor | None], after: Adjoint, shares: Sequence[Tensor] | None = None) -> list[Tensor]:
        """With ``shares``, the second moment counts as what one sample's share alone makes of it where it is less."""
        params = list(self.parameters())
        found: list[Tensor] = [torch.zeros_like(x) for x in after.weights]
        # a parameter without a gradient stays where it is, and so do its moments
        moving = [i for i, g in enumerate(grads) if g is not None]
        lambda_m, lambda_v, *lambda_v_max = ([x[i] for i in moving] for x in after.state)
        m, v, v_max, steps = self.lists([params[i] for i in moving])
        if shares is not None:
            entries = [(x, g, shares[i], s) for i, s, x in zip(moving, steps, v, strict=True) if (g := grads[i]) is not None]
            v = [raised(torch.zeros_like(g) if x is None else x, g * g, share, 1 - s.beta2, s.beta2) for x, g, share, s in entries]
        adam_op.adjoint(
            [params[i] for i in moving],
            [grads[i] for i in moving],
            m,
            v,
            v_max,
            steps,
            [after.weights[i] for i in moving],
            lambda_m,
            lambda_v,
            lambda_v_max[0] if lambda_v_max else [],
            out=[found[i] for i in moving],
        )
        return found

    def update(self, p: Tensor, g: Tensor | None) -> Tensor:
        """What a step with gradient ``g`` subtracts from ``p``, over lr, decoupled decay aside; ``g=None`` means zeros."""
        s = self[p]
        return definition.adam_update(s.scalars, p, g, *s.moments)

    def scaling(self, p: Tensor, g: Tensor | None, rule: str = "secant") -> Tensor:
        """``S``, the slope of ``update`` along the gradient, by ``rule``: secant, tangent, frozen or sgd."""
        s = self[p]
        return definition.scaling(rule, s.scalars, p, g, *s.moments)

    def empty_weights(self, p: Tensor) -> Tensor:
        """``w(empty)``: the weights after the step that momentum and weight decay would take alone."""
        s = self[p]
        return definition.empty_weights(s.scalars, p, *s.moments)

    def mid_weights(self, p: Tensor, g: Tensor) -> Tensor:
        """``w_mid``: halfway from ``w(empty)`` to the weights after the step with ``g``."""
        s = self[p]
        return definition.mid_weights(s.scalars, p, g, *s.moments)

    def weights(self, p: Tensor, g: Tensor) -> Tensor:
        """``w(S)``: the weights after the step with ``g``."""
        s = self[p]
        return self.empty_weights(p) - s.scalars.lr * (self.update(p, g) - self.update(p, None))

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s = self[p]
        return definition.expected_gradient(s.scalars, p, s.exp_avg, s.exp_avg_sq)


def local_part(x: Any) -> Any:
    """What this process has of a tensor that is spread over several; any other tensor, or None, is itself."""
    if not hasattr(x, "to_local"):
        return x
    with torch.no_grad():
        return x.to_local()


class _Held(NamedTuple):
    """What an optimizer was seen to hold."""

    entries: list[Any]  # of its parameters' states, one after another
    columns: _Columns
    steps: list[float | Tensor]


_HELD: "WeakKeyDictionary[torch.optim.Optimizer, _Held]" = WeakKeyDictionary()


def _held_by(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> _Held:
    """As it was seen in the step before, while it is the same."""
    state = optimizer.state
    states = [*state.values()] if same(params, [*state]) else [state.get(p, {}) for p in params]
    entries = [*chain.from_iterable(map(methodcaller("values"), states))]
    before = _HELD.get(optimizer)
    if before is not None and same(entries, before.entries) and same(params, before.columns.params):
        return before
    moments = ([x.get(name) for x in states] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    found = _Held(entries, _Columns.of(params, *moments), [x.get("step", 0) for x in states])
    if same(params, found.columns.params):  # else parts are made anew in every step
        _HELD[optimizer] = found
    return found


def _scalars(group: Mapping[str, Any], decoupled: bool, times: list[float | Tensor]) -> list[StepScalars]:
    """Of a group's parameters, which take steps of these numbers."""
    beta1, beta2 = group["betas"]
    common = StepScalars(
        t=0.0,
        lr=number(group["lr"]),
        beta1=number(beta1),
        beta2=number(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
        amsgrad=bool(group.get("amsgrad")),
        maximize=bool(group.get("maximize")),
    )
    if times and not isinstance(times[0], Tensor) and times.count(times[0]) == len(times):
        return [common._replace(t=times[0])] * len(times)
    known: dict[Any, StepScalars] = {}
    return [known.get(t) or known.setdefault(t, common._replace(t=t)) for t in times]


def _times(steps: list[float | Tensor]) -> list[float | Tensor]:
    """The numbers of the steps about to be taken, one per count of those taken; those held by a device come in one tensor."""
    held = [x for x in steps if isinstance(x, Tensor) and not x.is_cpu]
    if not held:
        return [x + 1 for x in map(float, steps)]
    if len({x.device for x in held}) > 1 or len(held) < len(steps):
        return [number(x) + 1 for x in steps]
    return list((torch.stack([x.detach().reshape(()) for x in held]).double() + 1).unbind())


register(torch.optim.Adam, AdamState.of)
