"""Adam's step as ops over lists of parameters: schemas, fakes, and the choice between the extension and the definitions.

Lists have one entry per parameter, as optimizers hold them. ``cpp`` is the compiled extension where it was built,
``reference`` is always there.
"""

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adam_ghost import extension
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim.adam_definition import RULES, StepScalars

Tensors = list[Tensor | None]

lib = torch.library.Library("adam_ghost", "FRAGMENT")
_STATE = "Tensor[] params, Tensor?[] grads, Tensor?[] exp_avgs, Tensor?[] exp_avg_sqs, Tensor?[] max_exp_avg_sqs"
_STEPS = "Tensor table, int[] rows"  # of step_table
# what is written may be an input too, as in every out= op of torch; in weight_points, [] where a point is not asked for
lib.define(
    f"variance_correction({_STATE}, Tensor[] val_grads, Tensor(a!)[] out, {_STEPS}, str rule, bool foreseen, str? impl) -> Tensor"
)
lib.define(f"weight_points({_STATE}, Tensor(a!)[] empty, Tensor(b!)[] mid, {_STEPS}, str? impl) -> ()")
lib.define(
    f"adjoint({_STATE}, Tensor(a!)[] lambda_w, Tensor(b!)[] lambda_m, Tensor(c!)[] lambda_v, Tensor(d!)[] lambda_v_max,"
    f" Tensor(e!)[] out, {_STEPS}, str? impl) -> ()"
)

_DONE, _NOT_PLAIN, _DTYPE, _LAYOUT = range(4)  # the extension's answers, in the order of csrc/bind.cpp


class Sums(NamedTuple):
    """Sums per parameter ``n`` and target ``K`` (``K = 1`` where validation gradients have no leading dimension), float64."""

    table: Tensor  # [n, 2 K], on the parameters' device

    @property
    def reached(self) -> Tensor:
        """``< P , g >`` [n, K]: what the scores of all samples add up to."""
        return self.table[..., : self.table.shape[-1] // 2]

    @property
    def history(self) -> Tensor:
        """``< val_grad , w - w(empty) >`` [n, K]: what momentum and decay alone take off the loss, to first order."""
        return self.table[..., self.table.shape[-1] // 2 :]

    def total(self) -> "Sums":
        """The same over all parameters: ``[K]``."""
        return Sums(self.table.sum(0))


class Corrected(NamedTuple):
    P: list[Tensor]
    sums: Sums


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
    foreseen: bool = False,
    out: list[Tensor] | None = None,
    impl: str | None = None,
) -> Corrected:
    """The direction ``P = lr * val_grad * S`` of every parameter, and the step's sums, in one pass over memory.

    Args:
        params: weights ``[*shape]``; the other lists have one entry per parameter, on the same device.
        grads: the gradients that ``S`` is formed at; None counts as zero, as in the next three.
        exp_avgs, exp_avg_sqs, max_exp_avg_sqs: Adam's state before the step.
        val_grads: gradients of the validation loss, ``[*shape]``, or ``[K, *shape]`` for ``K`` targets.
        steps: each parameter's scalars; 0-D tensors on the parameters' device are not read by the host.
        rule: ``secant``, ``tangent``, ``frozen`` or ``sgd``; see ``definition.scaling``.
        foreseen: form ``S`` at the gradients that history lets expect (``definition.expected_gradient``), not at ``grads``.
        out: where ``P`` goes, shaped like ``val_grads``; may be ``val_grads`` itself.
        impl: ``cpp`` (float32 and bfloat16) or ``reference``; chosen by device and dtype by default.

    Elements are computed in float32 (float64 for float64 parameters, by the reference), sums in float64, of ``P`` as it is
    written. Deterministic, whatever the number of threads. Where an element of ``grads`` is not finite, its ``P`` and the sums
    need not be. Raises ValueError, before anything is written, where a list's length, a shape or a device does not fit.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if out is None:
        out = [torch.empty_like(x, requires_grad=False) for x in val_grads]
    table = step_table(params, steps)
    if not params:
        return Corrected(out, Sums(torch.empty(0, 2, dtype=torch.float64)))
    state = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    return Corrected(out, Sums(run("variance_correction", *state, val_grads, out, *table, rule, foreseen, impl)))


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
    table = step_table(params, steps)
    if params:
        state = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
        run("weight_points", *state, empty or [], mid or [], *table, impl)


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
        out: where the derivatives by the gradients go, shaped like ``lambda_w``. No two of these five share memory.
        impl: as in ``variance_correction``.

    Arithmetic and errors are those of ``variance_correction``.
    """
    table = step_table(params, steps)
    if not lambda_v_max and any(s.amsgrad for s in steps):
        raise ValueError(f"lambda_v_max: expected {len(params)} entries, one per parameter, for amsgrad's steps, got 0")
    if params:
        state = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
        run("adjoint", *state, lambda_w, lambda_m, lambda_v, lambda_v_max, out, *table, impl)


def run(name: str, *arguments: Any) -> Any:
    """Calls an op; without the dispatcher where nothing watches, since over lists of hundreds of parameters it takes long."""
    with torch.no_grad():
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return getattr(torch.ops.adam_ghost, name)(*arguments)
        return IMPLEMENTATIONS[name](*arguments)


def _variance_correction(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, out, table, rows, rule, foreseen, impl):
    inputs = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads
    sums = new_sums(params, val_grads)
    check = lambda: _check_variance_correction(*inputs, out)  # noqa: E731
    if in_extension("variance_correction", impl, check, inputs, [out], table, rows, RULES.index(rule), foreseen, sums):
        return sums
    return definition.variance_correction(rule, table_steps(table, rows), *inputs, out, foreseen)


def _variance_correction_fake(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, out, table, rows, rule, foreseen, impl
):
    _check_variance_correction(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, out)
    return new_sums(params, val_grads)


def _check_variance_correction(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, out):
    _check_state(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    check(params, *targets(params, "val_grads", val_grads), val_grads=val_grads, out=out)


def new_sums(params: list[Tensor], val_grads: list[Tensor]) -> Tensor:
    _, K = targets(params, "val_grads", val_grads)
    return torch.empty(len(params), 2 * K, dtype=torch.float64, device=params[0].device)


def _weight_points(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows, impl):
    inputs = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    check = lambda: _check_weight_points(*inputs, empty, mid)  # noqa: E731
    if not in_extension("weight_points", impl, check, inputs, [empty, mid], table, rows):
        definition.weight_points(table_steps(table, rows), *inputs, empty, mid)


def _weight_points_fake(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows, impl):
    _check_weight_points(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid)


def _check_weight_points(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid):
    _check_state(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    check(params, empty=empty or None, mid=mid or None)


def _adjoint(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lambda_w, lambda_m, lambda_v, lambda_v_max, out, table, rows, impl
):
    inputs = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    outputs = lambda_w, lambda_m, lambda_v, lambda_v_max, out
    check = lambda: _check_adjoint(*inputs, *outputs)  # noqa: E731
    if not in_extension("adjoint", impl, check, inputs, outputs, table, rows):
        definition.adjoint(table_steps(table, rows), *inputs, *outputs)


def _adjoint_fake(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lambda_w, lambda_m, lambda_v, lambda_v_max, out, table, rows, impl
):
    state = params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    _check_adjoint(*state, lambda_w, lambda_m, lambda_v, lambda_v_max, out)


def _check_adjoint(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, lambda_w, lambda_m, lambda_v, lambda_v_max, out):
    _check_state(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
    written = {"lambda_w": lambda_w, "lambda_m": lambda_m, "lambda_v": lambda_v, "lambda_v_max": lambda_v_max, "out": out}
    if not lambda_v_max:
        del written["lambda_v_max"]
    check(params, *targets(params, "lambda_w", lambda_w), **written)
    for i, tensors in enumerate(zip(*written.values(), strict=True)):
        places = [(x.untyped_storage()._cdata, x.storage_offset()) for x in tensors]
        names = dict(zip(places, written, strict=True))
        if len(names) < len(written):
            twice = next(name for name in written if name not in names.values())
            raise ValueError(f"{twice}[{i}]: expected a tensor of its own, got that of another list")


def _check_state(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs):
    check(params, params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
FAKES: dict[str, Callable[..., Any]] = {}


def define(name: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Makes an op over lists of tensors known, whose schema is."""
    IMPLEMENTATIONS[name], FAKES[name] = implementation, fake
    lib.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adam_ghost::{name}", fake, lib=lib)


define("variance_correction", _variance_correction, _variance_correction_fake)
define("weight_points", _weight_points, _weight_points_fake)
define("adjoint", _adjoint, _adjoint_fake)


def in_extension(
    name: str, impl: str | None, check: Callable[[], None], inputs: Sequence[Tensors], outputs: Sequence[Tensors], *rest: Any
) -> bool:
    """Whether the extension did it. Else nothing is written, and ``check`` has found nothing wrong with the tensors.

    Raises where ``impl="cpp"`` asked for the extension and it cannot.
    """
    params: Any = inputs[0]  # each of them a tensor
    device, status = params[0].device.type, None
    why = extension.reason(device)
    if impl not in (None, "cpp", "reference"):
        raise ValueError(f"impl: expected None, 'cpp' or 'reference', got {impl!r}")
    if impl == "cpp" and why:
        raise RuntimeError(f"impl='cpp': {why}")
    if impl is None and why and device in extension.built:
        extension.warn_once(device)
    kernel = None if impl == "reference" or why else getattr(extension.C, name)
    if kernel and (status := kernel(*inputs, *outputs, *rest)) == _DONE:
        return True
    check()
    if kernel and status == _LAYOUT:  # tensors that are not dense are read from, and written through, row-major copies
        made = [row_major(x) for x in outputs]
        status = kernel(*map(row_major, inputs), *made, *rest)
        for x, y in zip(chain(*outputs), chain(*made), strict=True):
            if status == _DONE and x is not None and y is not None and x is not y:
                x.copy_(y)
    if impl == "cpp" and status != _DONE:
        raise TypeError(f"impl='cpp': {'float32 and bfloat16 only' if status == _DTYPE else 'not for these tensors'}")
    return status == _DONE


def step_table(params: list[Tensor], steps: Sequence[Any]) -> tuple[Tensor, list[int]]:
    """Each parameter's scalars, a NamedTuple, as a row of a float64 table ``[rows, fields]``, and the rows' numbers.

    Equal ones share a row. The table is on CPU, or on the parameters' device where that holds a number: the host does not
    read it then.
    """
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} entries, one per parameter, got {len(steps)}")
    index: dict[Any, int] = {}
    rows = [0] * len(steps)
    if steps and all(map(is_, steps, repeat(steps[0]))):
        index[steps[0]] = 0
    else:
        rows = [index.setdefault(s, len(index)) for s in steps]
    device = params[0].device if params else torch.device("cpu")
    held = device.type != "cpu" and any(isinstance(x, Tensor) and x.device == device for s in index for x in s)
    if held or torch.compiler.is_compiling():
        return torch.stack([_column(device, values) for values in zip(*index, strict=True)], 1), rows
    return torch.tensor([tuple(map(float, s)) for s in index], dtype=torch.float64), rows


def _column(device: torch.device, values: tuple[Tensor | float, ...]) -> Tensor:
    """One field of all rows, in as few launches as it takes: a column of one number is filled with it."""
    if any(isinstance(x, Tensor) for x in values):
        return torch.stack([x if isinstance(x, Tensor) else _filled(device, x, 1)[0] for x in values]).to(device, torch.float64)
    first, same = float(values[0]), 0
    while same < len(values) and values[same] == first:
        same += 1
    head = _filled(device, first, same)
    return head if same == len(values) else torch.cat([head, _column(device, values[same:])])


def _filled(device: torch.device, x: float, size: int) -> Tensor:
    # a fill can be captured into a CUDA graph; a copy of a host number, as torch.tensor makes it, cannot
    return torch.full((size,), x, dtype=torch.float64, device=device)


def table_steps(table: Tensor, rows: list[int]) -> list[StepScalars]:
    """``step_table`` undone: one ``StepScalars`` per parameter."""
    steps = [StepScalars(*row[:6], *map(bool, row[6:])) for row in table.tolist()]
    return [steps[i] for i in rows]


def targets(params: list[Tensor], name: str, of_targets: list[Tensor]) -> tuple[int, int]:
    """The number of leading target dimensions of the named list (0 or 1) and ``K``."""
    if not params or not of_targets:
        return 0, 1
    lead = of_targets[0].ndim - params[0].ndim
    if lead not in (0, 1):
        raise ValueError(f"{name}[0]: expected {params[0].ndim} dimensions, or one more, got {of_targets[0].ndim}")
    return lead, of_targets[0].shape[0] if lead == 1 else 1


def check(params: list[Tensor], lead: int = 0, K: int = 1, /, **lists: Sequence[Tensor | None] | None) -> None:
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


def row_major(tensors: Tensors) -> Tensors:
    return [None if x is None else x.contiguous() for x in tensors]
