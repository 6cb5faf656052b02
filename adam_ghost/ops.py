"""Ops on tensors: schemas, fakes, and the one place where an implementation is chosen.

``triton`` runs CUDA tensors (and CPU tensors under ``TRITON_INTERPRET=1``), ``cpp`` is the compiled extension where it was
built, ``reference`` is always there. The choice is by device and shape; ``impl=`` overrides it for tests and benchmarks.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost import cost, cpu, extension, reference, wgrad_cpu
from adam_ghost.lists import Tensors, check, check_steps, on_device, row_major, step_table, table_steps, targets
from adam_ghost.reference import RULES, StepScalars

_lib = torch.library.Library("adam_ghost", "DEF")


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


# ---- variance_correction and weight_points: Adam's step linearized, elementwise, over lists of parameters ----------------


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
def _(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads, out, table, rows, rule):
    inputs = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads]
    if not extension.reason(params[0].device.type):
        sums = _new_sums(params, val_grads)
        if _call(extension.C.variance_correction, inputs, [out], table, rows, RULES.index(rule), sums) == _DONE:
            return sums
    return reference.variance_correction(rule, table_steps(table, rows), *inputs, out)


@torch.library.register_fake("adam_ghost::variance_correction", lib=_lib)
def _(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, val_grads, dot_grads, out, table, rows, rule):
    return _new_sums(params, val_grads)


@torch.library.impl(_lib, "weight_points", "CompositeExplicitAutograd")
def _(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows):
    inputs = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs]
    if extension.reason(params[0].device.type) or _call(extension.C.weight_points, inputs, [empty, mid], table, rows) != _DONE:
        reference.weight_points(table_steps(table, rows), *inputs, empty, mid)


@torch.library.register_fake("adam_ghost::weight_points", lib=_lib)
def _(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, empty, mid, table, rows):
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
        rule: ``secant``, ``tangent``, ``frozen`` or ``sgd``; see ``reference.scaling``.
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
        return Direction(out, Sums(reference.variance_correction(rule, steps, *inputs, out)))


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
        reference.weight_points(steps, *inputs, *outputs)


# ---- the bilinear forms < P , g_i > and < D * g_i , g_j > of recorded layer calls ---------------------------------------

_lib.define("contract(Tensor a, Tensor b, Tensor P, Tensor? offsets, bool per_token, bool half, str? impl) -> Tensor")
_lib.define("wgrad_score(Tensor a, Tensor b, Tensor P, Tensor? offsets, str? impl) -> (Tensor, Tensor)")
_lib.define("wgrad_score_(Tensor(a!) grad, Tensor a, Tensor b, Tensor P, Tensor? offsets, str? impl) -> Tensor")
_lib.define(
    "ghost_gram(Tensor a, Tensor b, Tensor? a2, Tensor? b2, Tensor? row, Tensor? col, Tensor? offsets, Tensor? offsets2,"
    " str? impl) -> Tensor"
)
_lib.define(
    "embedding_score(Tensor indices, Tensor b, Tensor P, int? padding_idx, Tensor? offsets, bool per_token, str? impl) -> Tensor"
)
_lib.define(
    "norm_score(Tensor x, Tensor b, Tensor P_weight, Tensor? P_bias, float eps, str kind, Tensor? offsets, bool per_token,"
    " str? impl) -> Tensor"
)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


_forced: str | None = None  # a module's own, not a thread's: backward passes on a GPU have threads of their own


@contextmanager
def using(impl: str | None) -> Iterator[None]:
    """Within the block ``impl`` is the default of all bilinear forms, in whatever calls them: for tests and benchmarks."""
    global _forced
    before, _forced = _forced, impl
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _no_triton() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


@functools.cache
def _warn_no_triton() -> None:
    warnings.warn(f"adam_ghost: {_no_triton()}; slower reference code serves CUDA tensors", RuntimeWarning, stacklevel=4)


def _in_triton(impl: str | None, op: str, *tensors: Tensor) -> bool:
    """Whether the Triton kernel is to serve; raises where it, or what there is not, was asked for by name."""
    if impl not in (None, "triton", "cpp", "reference"):
        raise ValueError(f"impl: expected None, 'triton', 'cpp' or 'reference', got {impl!r}")
    if impl == "cpp":
        raise RuntimeError(f"impl='cpp': the extension has no {op}")
    device, why = tensors[0].device.type, ""
    if any(x.dtype not in _KERNEL_DTYPES for x in tensors):
        why = f"{op} takes float32, bfloat16 and float16"
    elif device != "cuda":
        # the interpreter is for tests: it serves only where it is asked for
        why = _no_triton() or ("" if impl and _interpreted() else f"no kernel runs on {device} tensors without TRITON_INTERPRET=1")
    elif why := _no_triton():
        _warn_no_triton()
    if impl == "triton" and why:
        raise RuntimeError(f"impl='triton': {why}")
    return impl != "reference" and not why


def has_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether the Triton kernel of ``op`` serves tensors like these by default."""
    return _in_triton(_forced, op, *tensors)


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the dtype of the reference: the widest among them, at least float32."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)
    return [None if x is None else x.to(dtype) for x in tensors]


def _alike(*tensors: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def _check_tokens(offsets: Tensor | None, last: dict[str, Tensor | None], offsets_name: str = "offsets") -> None:
    """Tensors ``[n, T, d]``, or ``[N, d]`` with offsets: the same samples and tokens in each."""
    ndim = 3 if offsets is None else 2
    lead = None
    for name, x in last.items():
        if x is None:
            continue
        if x.ndim != ndim:
            expected = "[n, T, d]" if offsets is None else f"[N, d] with {offsets_name}"
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)}")
        if lead is not None and x.shape[:-1] != lead[1]:
            raise ValueError(f"{name}: expected the tokens of {lead[0]}, {list(lead[1])}, got {list(x.shape[:-1])}")
        lead = lead or (name, x.shape[:-1])
    if offsets is not None and (offsets.ndim != 1 or len(offsets) < 1 or offsets.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"{offsets_name}: expected integers [n + 1], got {offsets.dtype} {list(offsets.shape)}")


def _check_shape(name: str, x: Tensor | None, *shape: int | None) -> None:
    if x is not None and (
        x.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, x.shape, strict=True))
    ):
        expected = ", ".join("K" if d is None else str(d) for d in shape)
        raise ValueError(f"{name}: expected [{expected}], got {list(x.shape)}")


def _scores_shape(x: Tensor, offsets: Tensor | None, per_token: bool, K: int, features: int = 1) -> list[int]:
    """``x`` has ``features`` dimensions after its tokens'."""
    tokens = list(x.shape[: x.ndim - features])
    return [*(tokens if per_token else [tokens[0] if offsets is None else offsets.shape[0] - 1]), K]


def _scores_dtype(*tensors: Tensor | None) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)


def contract(
    a: Tensor,
    b: Tensor,
    P: Tensor,
    *,
    offsets: Tensor | None = None,
    per_token: bool = False,
    half: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``sum over tokens and outputs of (a @ P.T) * b``: a linear layer's score of every sample, or token.

    Args:
        a: the layer's inputs ``[n, T, d_in]``; or ``[N, d_in]``, where sample ``i`` is rows ``offsets[i]:offsets[i + 1]``.
        b: gradients at its outputs, ``[n, T, d_out]`` or ``[N, d_out]``.
        P: directions ``[K, d_out, d_in]``; the kernel rounds them to the dtype of ``a``.
        offsets: integers ``[n + 1]`` from 0 to ``N``, ascending, on the same device; not checked, as that would wait for it.
        per_token: return ``[n, T, K]``, or ``[N, K]``, instead of ``[n, K]``.
        half: allow a CPU to round the operands of large float32 products to bfloat16.
        impl: ``triton`` (CUDA; float32, bfloat16, float16) or ``reference``; chosen by device and dtype by default.

    Sums are formed, and returned, in float32 (float64 for float64 inputs), in a fixed order. Raises ValueError naming the
    argument whose shape does not fit. Method section 4.1.
    """
    _check_tokens(offsets, {"a": a, "b": b})
    _check_shape("P", P, None, b.shape[-1], a.shape[-1])
    return torch.ops.adam_ghost.contract(a, b, P, offsets, per_token, half, impl or _forced)


@torch.library.impl(_lib, "contract", "CompositeExplicitAutograd")
def _(a, b, P, offsets, per_token, half, impl):
    if _in_triton(impl, "contract", a, b, P):
        from adam_ghost.kernels.contract import contract as kernel

        return kernel(*_alike(a, b), P, offsets, per_token)
    a, b, P = _wide(a, b, P)
    if a.device.type == "cpu" and offsets is None and not (impl or per_token):
        return cpu.contract(a, b, P, half)
    scores = reference.contract(a, b, P)
    return scores if per_token else reference.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::contract", lib=_lib)
def _(a, b, P, offsets, per_token, half, impl):
    return a.new_empty(_scores_shape(a, offsets, per_token, P.shape[0]), dtype=_scores_dtype(a, b, P))


def wgrad_score(
    a: Tensor, b: Tensor, P: Tensor, *, offsets: Tensor | None = None, grad: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """A linear layer's weight gradient ``b.T @ a`` over all tokens, ``[d_out, d_in]``, and its samples' scores ``[n, K]``.

    Args:
        a, b, P, offsets: as in ``contract``.
        grad: ``[d_out, d_in]``, added to in place and returned; otherwise the gradient is new, and at least float32.
        impl: as in ``contract``; on CUDA the default is the faster of the fused kernel and a contraction beside the library's
            product, by the cost model.

    Accumulates in float32 (float64 for float64 inputs), in a fixed order. Raises ValueError naming the argument whose shape
    does not fit. Method section 4.2.
    """
    _check_tokens(offsets, {"a": a, "b": b})
    _check_shape("P", P, None, b.shape[-1], a.shape[-1])
    _check_shape("grad", grad, *P.shape[1:])
    if grad is None:
        return torch.ops.adam_ghost.wgrad_score(a, b, P, offsets, impl or _forced)
    return grad, torch.ops.adam_ghost.wgrad_score_(grad, a, b, P, offsets, impl or _forced)


def _wgrad_score(a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None, impl: str | None, grad: Tensor | None = None):
    if _in_triton(impl, "wgrad_score", a, b, P):
        a, b = _alike(a, b)
        n = a.shape[0] if offsets is None else offsets.shape[0] - 1
        T = a.shape[-2] if offsets is None else a.shape[0] // max(n, 1)
        if impl == "triton" or cost.scores(n, T, *P.shape, itemsize=a.element_size()).best == "weight gradient":
            from adam_ghost.kernels.wgrad_score import wgrad_score as kernel

            into = grad if grad is not None and grad.dtype == torch.float32 and grad.is_contiguous() else None
            G, scores = kernel(a, b, P, offsets, into)
            return G, scores, into is not None
        G = (b.flatten(0, -2).mT @ a.flatten(0, -2)).float()
        return G, contract(a, b, P, offsets=offsets, impl=impl), False
    a, b, P = _wide(a, b, P)
    if a.device.type != "cpu" or impl == "reference":
        return *reference.wgrad_score(a, b, P, offsets), False
    return *wgrad_cpu.wgrad_score(a, b, P, offsets=offsets, grad=grad), grad is not None


@torch.library.impl(_lib, "wgrad_score", "CompositeExplicitAutograd")
def _(a, b, P, offsets, impl):
    return _wgrad_score(a, b, P, offsets, impl)[:2]


@torch.library.impl(_lib, "wgrad_score_", "CompositeExplicitAutograd")
def _(grad, a, b, P, offsets, impl):
    G, scores, added = _wgrad_score(a, b, P, offsets, impl, grad)
    if not added:
        grad.add_(G)
    return scores


@torch.library.register_fake("adam_ghost::wgrad_score", lib=_lib)
def _(a, b, P, offsets, impl):
    dtype = _scores_dtype(a, b, P)
    return a.new_empty(P.shape[1:], dtype=dtype), a.new_empty(_scores_shape(a, offsets, False, P.shape[0]), dtype=dtype)


@torch.library.register_fake("adam_ghost::wgrad_score_", lib=_lib)
def _(grad, a, b, P, offsets, impl):
    return a.new_empty(_scores_shape(a, offsets, False, P.shape[0]), dtype=_scores_dtype(a, b, P))


def ghost_gram(
    a: Tensor,
    b: Tensor,
    a2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    row: Tensor | None = None,
    col: Tensor | None = None,
    offsets: Tensor | None = None,
    offsets2: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """``< D * g_i , g_j >`` of a linear layer between two sets of samples, ``D = outer(row, col)``: ``[n, m]``.

    Args:
        a, b, offsets: the first set, ``[n, T, d_in]`` and ``[n, T, d_out]``, or ragged, as in ``contract``.
        a2, b2, offsets2: the second set, of ``m`` samples; without it, the first against itself, each pair computed once.
        row: scales of the outputs ``[d_out]``; col: of the inputs ``[d_in]``; 1 where not given.
        impl: as in ``contract``.

    Nothing of size token by token is stored by the kernel. Float32 (float64 for float64 inputs), in a fixed order; the kernel
    rounds scaled inputs to their dtype. Raises ValueError naming the argument whose shape does not fit. Method section 4.3.
    """
    if (a2 is None) != (b2 is None):
        raise ValueError(f"{'b2' if b2 is None else 'a2'}: expected both a2 and b2, or neither")
    if a2 is None and offsets2 is not None:
        raise ValueError("offsets2: expected None without a2 and b2")
    _check_tokens(offsets, {"a": a, "b": b})
    _check_tokens(offsets2, {"a2": a2, "b2": b2}, "offsets2")
    if a2 is not None:
        _check_shape("a2", a2, *a2.shape[:-1], a.shape[-1])
        _check_shape("b2", b2, *b2.shape[:-1], b.shape[-1])
    _check_shape("row", row, b.shape[-1])
    _check_shape("col", col, a.shape[-1])
    return torch.ops.adam_ghost.ghost_gram(a, b, a2, b2, row, col, offsets, offsets2, impl or _forced)


@torch.library.impl(_lib, "ghost_gram", "CompositeExplicitAutograd")
def _(a, b, a2, b2, row, col, offsets, offsets2, impl):
    tensors = [x for x in (a, b, a2, b2) if x is not None]
    if _in_triton(impl, "ghost_gram", *tensors):
        from adam_ghost.kernels.ghost_gram import ghost_gram as kernel

        a, b, *second = _alike(*tensors)
        row, col = (x if x is None else x.float().contiguous() for x in (row, col))
        return kernel(a, b, *(second or (None, None)), row, col, offsets, offsets2)
    a, b, a2, b2, row, col = _wide(a, b, a2, b2, row, col)
    second = (a, b, offsets) if a2 is None else (a2, b2, offsets2)
    return reference.ghost_gram(a, b, *second[:2], row, col, offsets, second[2])


@torch.library.register_fake("adam_ghost::ghost_gram", lib=_lib)
def _(a, b, a2, b2, row, col, offsets, offsets2, impl):
    n = a.shape[0] if offsets is None else offsets.shape[0] - 1
    m = n if a2 is None else a2.shape[0] if offsets2 is None else offsets2.shape[0] - 1
    return a.new_empty(n, m, dtype=_scores_dtype(a, b, a2, b2))


def embedding_score(
    indices: Tensor,
    b: Tensor,
    P: Tensor,
    *,
    padding_idx: int | None = None,
    offsets: Tensor | None = None,
    per_token: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``sum over tokens of P[k, index] . b``: an embedding's score of every sample, or token; 0 at ``padding_idx``.

    Args:
        indices: integers ``[n, T]``, or ``[N]`` with ``offsets [n + 1]``; in range, which is not checked on the device.
        b: gradients at the outputs ``[n, T, d]`` or ``[N, d]``.
        P: directions ``[K, rows, d]``, read in their own dtype.
        per_token, offsets, impl: as in ``contract``, and so are dtypes, order and errors.
    """
    _check_tokens(offsets, {"b": b})
    _check_shape("indices", indices, *b.shape[:-1])
    _check_shape("P", P, None, P.shape[1] if P.ndim == 3 else 0, b.shape[-1])
    return torch.ops.adam_ghost.embedding_score(indices, b, P, padding_idx, offsets, per_token, impl or _forced)


@torch.library.impl(_lib, "embedding_score", "CompositeExplicitAutograd")
def _(indices, b, P, padding_idx, offsets, per_token, impl):
    if _in_triton(impl, "embedding_score", b, P):
        from adam_ghost.kernels.embedding import embedding_score as kernel

        return kernel(indices, b, P, padding_idx, offsets, per_token)
    scores = reference.embedding_score(indices, *_wide(b, P), padding_idx)
    return scores if per_token else reference.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::embedding_score", lib=_lib)
def _(indices, b, P, padding_idx, offsets, per_token, impl):
    return b.new_empty(_scores_shape(b, offsets, per_token, P.shape[0]), dtype=_scores_dtype(b, P))


def norm_score(
    x: Tensor,
    b: Tensor,
    P_weight: Tensor,
    P_bias: Tensor | None,
    eps: float | None,
    kind: str,
    *,
    offsets: Tensor | None = None,
    per_token: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``sum over tokens of (x_hat * P_weight + P_bias) . b``: the score of a norm over the last dimension.

    Args:
        x: the layer's inputs ``[n, T, d]``, or ``[N, d]`` with ``offsets [n + 1]``; b: gradients at its outputs, the same.
        P_weight, P_bias: directions ``[K, d]``; no bias: None.
        eps: the layer's; None: the machine epsilon of x's dtype, as in ``torch.nn.RMSNorm``.
        kind: ``layer`` or ``rms``.
        per_token, offsets, impl: as in ``contract``, and so are dtypes, order and errors. The kernel takes d up to 65,536.
    """
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    _check_tokens(offsets, {"x": x, "b": b})
    _check_shape("b", b, *x.shape)
    _check_shape("P_weight", P_weight, None, x.shape[-1])
    _check_shape("P_bias", P_bias, *P_weight.shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return torch.ops.adam_ghost.norm_score(x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl or _forced)


@torch.library.impl(_lib, "norm_score", "CompositeExplicitAutograd")
def _(x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl):
    if (impl == "triton" or x.shape[-1] <= 65536) and _in_triton(impl, "norm_score", x, b, P_weight):
        from adam_ghost.kernels.norm import norm_score as kernel

        return kernel(x, b, P_weight, P_bias, eps, kind, offsets, per_token)
    scores = reference.norm_score(*_wide(x, b, P_weight, P_bias), eps, kind)
    return scores if per_token else reference.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::norm_score", lib=_lib)
def _(x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl):
    return x.new_empty(_scores_shape(x, offsets, per_token, P_weight.shape[0]), dtype=_scores_dtype(x, b, P_weight, P_bias))
