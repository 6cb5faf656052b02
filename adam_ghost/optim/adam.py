"""Adam and AdamW: a ``torch.optim.Adam`` or ``AdamW`` read as what it is to one step; copies nothing."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import RULES, StepScalars
from adam_ghost.optim.history import raised
from adam_ghost.optim.protocol import Adjoint, Kept, Linearized, number, register


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


class AdamState:
    """The fixed state of one step's game: what Adam will do to any gradient, without doing it.

    Built from an optimizer by ``AdamState.of``, or from ``ParamState`` rows. Every method is a pure function of one
    parameter ``p`` held by the state and a gradient ``g`` of its shape; results are in at least float32.
    """

    linearizations: tuple[str, ...] = RULES
    not_carried: str | None = None
    not_foreseen: str | None = None

    def __init__(self, params: Iterable[ParamState]):
        self._params = {s.param: s for s in params}

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
        made = cls(())
        made._params = dict(_read(optimizer, groups, decoupled))
        return made

    def __contains__(self, p: Tensor) -> bool:
        return p in self._params

    def __getitem__(self, p: Tensor) -> ParamState:
        return self._params[p]

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._params)

    def lists(self, params: Sequence[Tensor]) -> tuple[list, list, list, list]:
        """``exp_avgs``, ``exp_avg_sqs``, ``max_exp_avg_sqs`` and scalars of ``params``, as the ops take them."""
        return self._lists([self._params[p] for p in params])[1:]

    @staticmethod
    def _lists(rows: Sequence[ParamState]) -> tuple[list, list, list, list, list]:
        """The parameters of ``rows``, and their ``lists``."""
        params, m, v, v_max, scalars = ([row[i] for row in rows] for i in range(5))
        return params, m, v, v_max, scalars

    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        params, *state = self._lists([self._params[p] for p in params])
        adam_op.weight_points(params, list(grads), *state, empty=empty, mid=mid)

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
        params, m, v, v_max, steps = self._lists([self._params[p] for p in params])
        state = params, list(grads), m, v, v_max
        P, sums = adam_op.variance_correction(*state, list(val_grads), steps, rule=rule, foreseen=foreseen, out=out)
        sums = sums.total()
        return Linearized(P, sums.history.to(out[0].dtype), sums.reached.to(out[0].dtype))

    def linearize_expected(self, params: Sequence[Tensor], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]) -> Linearized:
        return self._linearize(params, [None] * len(params), val_grads, rule, out, foreseen=True)

    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        return self.scaling(p, g) * self[p].scalars.lr

    def steps_taken(self, default: int) -> int:
        started = [s.scalars.t for s in self._params.values() if s.exp_avg is not None]
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
        rows = list(copied._params.values())
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
        kinds = 3 if any(s.scalars.amsgrad for s in self._params.values()) else 2
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


def _read(
    optimizer: torch.optim.Optimizer, groups: Iterable[Mapping[str, Any]], decoupled: bool
) -> Iterator[tuple[Tensor, ParamState]]:
    for group in groups:
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
        states = [optimizer.state.get(p, {}) for p in group["params"]]
        times = _times([state.get("step", 0) for state in states])
        known: dict[Any, StepScalars] = {}
        for p, state, t in zip(group["params"], states, times, strict=True):
            scalars = known.get(t)
            if scalars is None:
                scalars = known[t] = common._replace(t=t)
            row = ParamState(p, state.get("exp_avg"), state.get("exp_avg_sq"), state.get("max_exp_avg_sq"), scalars)
            yield p, ParamState(*map(local_part, row)) if hasattr(p, "to_local") else row


def _times(steps: list[float | Tensor]) -> list[float | Tensor]:
    """The numbers of the steps about to be taken, one per count of those taken; those held by a device come in one tensor."""
    held = [x for x in steps if isinstance(x, Tensor) and x.device.type != "cpu"]
    if not held:
        return [float(x) + 1 for x in steps]
    if len({x.device for x in held}) > 1 or len(held) < len(steps):
        return [number(x) + 1 for x in steps]
    return list((torch.stack([x.detach().reshape(()) for x in held]).double() + 1).unbind())


register(torch.optim.Adam, AdamState.of)
