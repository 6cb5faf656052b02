"""Adam's step as ops over lists of parameters: schemas, fakes, and the choice between the extension and the definitions.

Lists have one entry per parameter, as optimizers hold them. ``cpp`` is the compiled extension where it was built,
``reference`` is always there.
"""

from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost import extension
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim.adam_definition import RULES, StepScalars

Tensors = list[Tensor | None]

_lib = torch.library.Library("adam_ghost", "FRAGMENT")


def _watched() -> bool:
    """Whether a tracer or a dispatch mode is active: then an op has to be called as an op."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _compiled(impl: str | None, device: str) -> bool:
    """Whether the extension is to serve; raises where it was asked for by name and cannot."""
    if impl not in (None, "cpp", "reference"):
        raise ValueError(f"impl: expected None, 'cpp' or 'reference', got {impl!r}")
    if impl == "reference" or not (why := extension.reason(device)):
        return impl != "reference"
    if impl == "cpp":
        raise RuntimeError(f"impl='cpp': {why}")
    if device in extension.built and not torch.compiler.is_compiling():
        extension.warn_once(device)
    return False


class Sums(NamedTuple):
    """Sums per parameter ``n`` and target ``K`` (``K = 1`` where validation gradients have no leading dimension), float64."""

    table: Tensor  # [n, 3 K + 2], on the parameters' device

    @property
    def K(self) -> int:
        return (self.table.shape[-1] - 2) // 3

    @property
    def reached(self) -> Tensor:
        """``< P , g >`` [n, K]: what the scores of all samples add up to."""
        return self.table[..., : self.K]

    @property
    def history(self) -> Tensor:
        """``< val_grad , w - w(empty) >`` [n, K]: what momentum and decay alone take off the loss, to first order."""
        return self.table[..., self.K : 2 * self.K]

    @property
    def P_norm2(self) -> Tensor:
        """``|P|^2`` [n, K]."""
        return self.table[..., 2 * self.K : 3 * self.K]

    @property
    def g_norm2(self) -> Tensor:
        """``|g|^2`` [n]."""
        return self.table[..., -2]

    @property
    def nonfinite(self) -> Tensor:
        """How many elements of ``g`` are infinite or NaN [n]."""
        return self.table[..., -1]

    def total(self) -> "Sums":
        """The same over all parameters: ``[K]`` and ``[]``."""
        return Sums(self.table.sum(0))


class Direction(NamedTuple):
    P: list[Tensor]
    sums: Sums


_STATE = "Tensor[] params, Tensor?[] grads, Tensor?[] exp_avgs, Tensor?[] exp_avg_sqs, Tensor?[] max_exp_avg_sqs"
# what is written may be an input too, as in every out= op of torch; in weight_points, [] where a point is not asked for
_lib.define(
    f"variance_correction({_STATE}, Tensor[] val_grads, Tensor?[] dot_grads, Tensor(a!)[] out,"
    " Tensor table, int[] rows, str rule) -> Tensor"
)
_lib.define(f"weight_points({_STATE}, Tensor(a!)[] empty, Tensor(b!)[] mid, Tensor table, int[] rows) -> ()")
_lib.define(
    f"adjoint({_STATE}, Tensor(a!)[] lambda_w, Tensor(b!)[] lambda_m, Tensor(c!)[] lambda_v, Tensor(d!)[] lambda_v_max,"
    " Tensor(e!)[] out, Tensor table, int[] rows) -> ()"
)

_DONE, _NOT_PLAIN, _DTYPE, _LAYOUT = range(4)  # the extension's answers, in the order of csrc/bind.cpp


def _call(kernel, inputs: list[Tensors], outputs: list[list[Tensor]], *rest) -> int:
    """The extension's answer. Tensors that are not dense are read from, and written through, row-major copies."""
    status = kernel(*inputs, *outputs, *rest)
    if status == _LAYOUT:
        made = [[torch.empty_like(y, memory_format=torch.contiguous_format) for y in x] for x in outputs]
        status = kernel(*map(row_major, inputs), *made, *rest)
        if status == _DONE:
            for x, y in zip(chain(*outputs), chain(*made), strict=True):
                x.copy_(y)
    return status


def _steps(steps: list[StepScalars], device: torch.device) -> tuple:
    """The extension reads the list itself; only numbers that an accelerator holds are handed over as a table."""
    return step_table(steps, device) if on_device(steps, device) else (steps, [])


def _refused(status: int, impl: str | None) -> None:
    """Reference code takes what the extension does not, unless the extension was asked for by name."""
    if impl == "cpp":
        raise TypeError(f"impl='cpp': {'float32 and bfloat16 only' if status == _DTYPE else 'not for these tensors'}")


def _new_sums(params: list[Tensor], val_grads: list[Tensor]) -> Tensor:
    _, K = targets(params, val_grads)
    return torch.empty(len(params), 3 * K + 2, dtype=torch.float64, device=params[0].device)


@torch.library.impl(_lib, "variance_correction", "CompositeExplicitAutograd")
def _variance_correction_impl(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads, out, table, rows, rule):
    inputs = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads]
    if not extension.reason(params[0].device.type):
        sums = _new_sums(params, val_grads)
        if _call(extension.C.variance_correction, inputs, [out], table, rows, RULES.index(rule), sums) == _DONE:
            return sums
    return definition.variance_correction(rule, table_steps(table, rows), *inputs, out)


@torch.library.register_fake("adam_ghost::variance_correction", lib=_lib)
def _variance_correction_fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads, out, table, rows, rule):
    return _new_sums(params, val_grads)


@torch.library.impl(_lib, "weight_points", "CompositeExplicitAutograd")
def _weight_points_impl(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows):
    inputs = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    if extension.reason(params[0].device.type) or _call(extension.C.weight_points, inputs, [empty, mid], table, rows) != _DONE:
        definition.weight_points(table_steps(table, rows), *inputs, empty, mid)


@torch.library.register_fake("adam_ghost::weight_points", lib=_lib)
def _weight_points_fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows):
    return None


@torch.library.impl(_lib, "adjoint", "CompositeExplicitAutograd")
def _adjoint_impl(*arguments):
    *lists, table, rows = arguments
    definition.adjoint(table_steps(table, rows), *lists)


@torch.library.register_fake("adam_ghost::adjoint", lib=_lib)
def _adjoint_fake(*arguments):
    return None


def _check_state(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs) -> None:
    check(params, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)


def _check_directions(params, val_grads, dot_grads, out) -> None:
    lead, K = targets(params, val_grads)
    if lead not in (0, 1):
        raise ValueError(f"val_grads[0]: expected {params[0].ndim} dimensions, or one more, got {val_grads[0].ndim}")
    check(params, dot_grads=dot_grads)
    check(params, lead, K, val_grads=val_grads, out=out)


def variance_correction(
    params: list[Tensor],
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    val_grads: list[Tensor],
    steps: list[StepScalars],
    *,
    rule: str = "secant",
    dot_grads: Tensors | None = None,
    out: list[Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Direction:
    """The direction ``P = lr * val_grad * S`` of every parameter, and the step's sums, in one pass over memory.

    Args:
        params: weights ``[*shape]``; the other lists have one entry per parameter, on the same device.
        grads: the gradients that ``S`` is formed at; None counts as zero, as in the next three.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: Adam's state before the step.
        val_grads: gradients of the validation loss, ``[*shape]``, or ``[K, *shape]`` for ``K`` targets.
        steps: each parameter's scalars; 0-D tensors on the parameters' device are not read by the host.
        rule: ``secant``, ``tangent``, ``frozen`` or ``sgd``; see ``definition.scaling``.
        dot_grads: the gradients of ``Sums.reached``, where they are not ``grads``.
        out: where ``P`` goes, shaped like ``val_grads``; may be ``val_grads`` itself.
        out_dtype: dtype of ``P`` where ``out`` is not given; ``val_grads``' by default.
        impl: ``cpp`` (float32 and bfloat16) or ``reference``; chosen by device and dtype by default.

    Elements are computed in float32 (float64 for float64 parameters, by the reference), sums in float64, of ``P`` as it is
    written. Deterministic, whatever the number of threads. An element of ``grads`` that is not finite is counted in
    ``Sums.nonfinite``; its ``P`` need not be finite. Raises ValueError, before anything is written, where a list's length, a
    shape or a device does not fit.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    check_steps(params, steps)
    if out is None:
        out = [torch.empty_like(x, dtype=out_dtype, requires_grad=False) for x in val_grads]
    if not params:
        return Direction(out, Sums(torch.empty(0, 5, dtype=torch.float64)))
    state = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    inputs = [*state, val_grads, grads if dot_grads is None else dot_grads]
    device, status = params[0].device, None
    if _compiled(impl, device.type):
        status = _NOT_PLAIN
        if not _watched():
            sums, rule_id = _new_sums(params, val_grads), RULES.index(rule)
            status = _call(extension.C.variance_correction, inputs, [out], *_steps(steps, device), rule_id, sums)
            if status == _DONE:
                return Direction(out, Sums(sums))
    _check_state(*state)
    _check_directions(params, *inputs[5:], out)
    with torch.no_grad():
        if status == _NOT_PLAIN:
            sums = torch.ops.adam_ghost.variance_correction(*inputs, out, *step_table(steps, device), rule)
            return Direction(out, Sums(sums))
        _refused(status, impl)
        return Direction(out, Sums(definition.variance_correction(rule, steps, *inputs, out)))


def weight_points(
    params: list[Tensor],
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: list[StepScalars],
    *,
    empty: list[Tensor] | None = None,
    mid: list[Tensor] | None = None,
    impl: str | None = None,
) -> None:
    """Write ``w(empty)``, where history alone takes the weights, and ``w_mid``, halfway from there to the step's end.

    ``empty`` and ``mid`` are lists of buffers shaped like ``params`` and may be ``params`` itself: the weights are then moved
    in place. The other arguments, arithmetic and errors are those of ``variance_correction``.
    """
    check_steps(params, steps)
    if not params:
        return
    inputs, outputs = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs], [empty or [], mid or []]
    device, status = params[0].device, None
    if _compiled(impl, device.type):
        status = _NOT_PLAIN if _watched() else _call(extension.C.weight_points, inputs, outputs, *_steps(steps, device))
        if status == _DONE:
            return
    _check_state(*inputs)
    check(params, empty=empty, mid=mid)
    with torch.no_grad():
        if status == _NOT_PLAIN:
            return torch.ops.adam_ghost.weight_points(*inputs, *outputs, *step_table(steps, device))
        _refused(status, impl)
        definition.weight_points(steps, *inputs, *outputs)


def adjoint(
    params: list[Tensor],
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: list[StepScalars],
    lambda_w: list[Tensor],
    lambda_m: list[Tensor],
    lambda_v: list[Tensor],
    lambda_v_max: list[Tensor],
    *,
    out: list[Tensor],
    impl: str | None = None,
) -> None:
    """The vector-Jacobian product of one step of every parameter, in one pass over memory; see ``definition.step_adjoint``.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps: the state before the step, and its gradients and scalars,
            as in ``variance_correction``.
        lambda_w, lambda_m, lambda_v, lambda_v_max: derivatives of a number, or of ``K``, by the state after the step,
            ``[*shape]`` or ``[K, *shape]``; replaced by those by the state before it. ``lambda_v_max`` may be ``[]`` where no step
            is amsgrad's, and stays as it is where its step is not.
        out: where the derivatives by the gradients go, shaped like ``lambda_w``; memory of its own.
        impl: as in ``variance_correction``.

    Elements are computed in float32 (float64 for float64 parameters, by the reference). Raises ValueError, before anything is
    written, where a list's length, a shape or a device does not fit.
    """
    check_steps(params, steps)
    if not params:
        return
    state, lambdas = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs], [lambda_w, lambda_m, lambda_v, lambda_v_max]
    _check_state(*state)
    _check_adjoints(params, steps, *lambdas, out)
    if impl == "cpp":
        raise RuntimeError("impl='cpp': the extension has no adjoint")
    with torch.no_grad():
        torch.ops.adam_ghost.adjoint(*state, *lambdas, out, *step_table(steps, params[0].device))


def _check_adjoints(params, steps, lambda_w, lambda_m, lambda_v, lambda_v_max, out) -> None:
    lead, K = targets(params, lambda_w)
    if lead not in (0, 1):
        raise ValueError(f"lambda_w[0]: expected {params[0].ndim} dimensions, or one more, got {lambda_w[0].ndim}")
    written = {"lambda_w": lambda_w, "lambda_m": lambda_m, "lambda_v": lambda_v, "lambda_v_max": lambda_v_max, "out": out}
    if not lambda_v_max:
        if any(s.amsgrad for s in steps):
            raise ValueError(f"lambda_v_max: expected {len(params)} entries, one per parameter, for amsgrad's steps, got 0")
        del written["lambda_v_max"]
    check(params, lead, K, **written)
    for i, tensors in enumerate(zip(*written.values(), strict=True)):
        names = {id(x): name for name, x in zip(written, tensors, strict=True)}
        if len(names) < len(written):
            raise ValueError(f"{min(set(written) - set(names.values()))}[{i}]: expected a tensor of its own, it is written twice")


def step_table(steps: list[StepScalars], device: torch.device) -> tuple[Tensor, list[int]]:
    """``steps`` as float64 ``[rows, 9]`` on ``device``, or on CPU where none is held there, and each parameter's row."""
    index: dict[StepScalars, int] = {}
    rows = [index.setdefault(s, len(index)) for s in steps]
    held = on_device(steps, device)
    if held or torch.compiler.is_compiling():
        return torch.stack([torch.stack([_on(device, x) for x in s]) for s in index]), rows
    return torch.tensor([tuple(map(float, s)) for s in index], dtype=torch.float64), rows


def on_device(steps: list[StepScalars], device: torch.device) -> bool:
    """Whether an accelerator holds scalars of these steps: then the host does not read them."""
    return device.type != "cpu" and any(isinstance(x, Tensor) and x.device == device for s in set(steps) for x in s)


def _on(device: torch.device, x: Tensor | float) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64)
    # a fill can be captured into a CUDA graph; a copy of a host number, as torch.tensor makes it, cannot
    return torch.full((), x, dtype=torch.float64, device=device)


def table_steps(table: Tensor, rows: list[int]) -> list[StepScalars]:
    """``step_table`` undone: one ``StepScalars`` per parameter."""
    steps = [StepScalars(*row[:6], *map(bool, row[6:])) for row in table.tolist()]
    return [steps[i] for i in rows]


def targets(params: list[Tensor], val_grads: list[Tensor]) -> tuple[int, int]:
    """The number of leading target dimensions of ``val_grads`` (0 or 1) and ``K``."""
    if not params or not val_grads:
        return 0, 1
    lead = val_grads[0].ndim - params[0].ndim
    return lead, val_grads[0].shape[0] if lead == 1 else 1


def check(params: list[Tensor], lead: int = 0, K: int = 1, /, **lists: Tensors | None) -> None:
    """Raise ValueError naming the first list and entry whose length, shape or device does not suit ``params``.

    ``lead=1``: entries are ``[K, *param]`` instead of ``[*param]``.
    """
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, one per parameter, got {len(tensors)}")
        for i, (w, x) in enumerate(zip(params, tensors, strict=True)):
            expected = [K] * lead + list(w.shape)
            if x is not None and list(x.shape) != expected:
                raise ValueError(f"{name}[{i}]: expected shape {expected}, got {list(x.shape)}")
            if x is not None and x.device != params[0].device:
                raise ValueError(f"{name}[{i}]: expected a tensor on {params[0].device}, as params[0], got {x.device}")


def check_steps(params: list[Tensor], steps: list[StepScalars]) -> None:
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} entries, one per parameter, got {len(steps)}")


def row_major(tensors: Tensors) -> Tensors:
    return [None if x is None else x.contiguous() for x in tensors]
