"""Ops on layer calls: the bilinear forms ``< P , g_i >`` and ``< D * g_i , g_j >``; schemas, fakes, and the choice of who serves.

``triton`` runs CUDA tensors (and CPU tensors under ``TRITON_INTERPRET=1``), ``reference`` is always there. The choice is by
device and shape; ``impl=`` overrides it for tests and benchmarks.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adam_ghost.scores import cost, cpu, definition
from adam_ghost.warn import warn

_lib = torch.library.Library("adam_ghost", "FRAGMENT")

_lib.define(
    "contract(Tensor a, Tensor b, Tensor P, Tensor? P_bias, Tensor? offsets, bool per_token, bool half, str? impl) -> Tensor"
)
_lib.define("contract_grouped(Tensor a, Tensor b, Tensor P, Tensor ends, str? impl) -> Tensor")
_lib.define("wgrad_score(Tensor a, Tensor b, Tensor P, Tensor? offsets, str? impl) -> (Tensor, Tensor)")
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
_WIDE = {torch.float32, torch.float64}
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


def forced() -> str | None:
    """The implementation asked for by ``using``."""
    return _forced


@functools.cache
def _no_triton() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


@functools.cache
def _too_old(device: int | None) -> str:
    """Why no kernel runs on a CUDA device; empty where they do."""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"the kernels need a GPU of sm_80 or later, and this one is sm_{major}{minor}"


@functools.cache
def _warn_slow(why: str) -> None:
    warn(f"{why}; slower reference code serves CUDA tensors", RuntimeWarning)


def _in_triton(impl: str | None, op: str, *tensors: Tensor) -> bool:
    """Whether the Triton kernel is to serve; raises where it, or what there is not, was asked for by name."""
    if impl not in (None, "triton", "cpp", "reference"):
        raise ValueError(f"impl: expected None, 'triton', 'cpp' or 'reference', got {impl!r}")
    if impl == "cpp":
        raise RuntimeError(f"impl='cpp': the extension has no {op}")
    device, why = tensors[0].device.type, ""
    if impl is None and device == "cpu":
        return False
    if any(x.dtype not in _KERNEL_DTYPES for x in tensors):
        why = f"{op} takes float32, bfloat16 and float16"
    elif device != "cuda":
        # the interpreter is for tests: it serves only where it is asked for
        why = _no_triton() or ("" if impl and _interpreted() else f"no kernel runs on {device} tensors without TRITON_INTERPRET=1")
    elif why := _no_triton() or _too_old(tensors[0].device.index):
        _warn_slow(why)
    if impl == "triton" and why:
        raise RuntimeError(f"impl='triton': {why}")
    return impl != "reference" and not why


def _run(op: str, impl: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an op; without the dispatcher where nothing watches, as it costs the host more than a small product."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or isinstance(arguments[0], FakeTensor):
        return getattr(torch.ops.adam_ghost, op)(*arguments)
    if not torch.is_grad_enabled():
        return impl(*arguments)
    with torch.no_grad():
        return impl(*arguments)


def has_kernel(op: str, *tensors: Tensor) -> bool:
    """Whether the Triton kernel of ``op`` serves tensors like these by default."""
    return _in_triton(_forced, op, *tensors)


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """In the dtype of the reference: the widest among them, at least float32."""
    dtype = _scores_dtype(*tensors)
    return [x if x is None or x.dtype == dtype else x.to(dtype) for x in tensors]


def _alike(*tensors: Tensor) -> list[Tensor]:
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def _as_multiplied(a: Tensor, b: Tensor) -> list[Tensor]:
    """What the layer multiplied: autocast rounds float32 inputs, a norm's outputs, to the 16 bits of the gradients here."""
    if b.element_size() == 2 and a.dtype == torch.float32:
        return [a.to(b.dtype), b]
    return _alike(a, b)


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


def _check_layer(a: Tensor, b: Tensor, P: Tensor, P_bias: Tensor | None, offsets: Tensor | None) -> None:
    """A linear layer's call and its directions."""
    bias_fits = P_bias is None or P_bias.shape == P.shape[:2]
    if (
        offsets is None
        and a.ndim == P.ndim == 3
        and (*a.shape[:2], P.shape[1]) == b.shape
        and a.shape[2] == P.shape[2]
        and bias_fits
    ):
        return  # as nearly always: what does not fit is found and named below
    _check_tokens(offsets, {"a": a, "b": b})
    _check_shape("P", P, None, b.shape[-1], a.shape[-1])
    _check_shape("P_bias", P_bias, P.shape[0], b.shape[-1])


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
    dtypes = {x.dtype for x in tensors if x is not None}
    if len(dtypes) == 1 and dtypes <= _WIDE:
        return dtypes.pop()
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors if x is not None), torch.float32)


def contract(
    a: Tensor,
    b: Tensor,
    P: Tensor,
    P_bias: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    per_token: bool = False,
    half: bool = False,
    impl: str | None = None,
) -> Tensor:
    """``sum over tokens and outputs of (a @ P.T + P_bias) * b``: a linear layer's score of every sample, or token.

    Args:
        a: the layer's inputs ``[n, T, d_in]``; or ``[N, d_in]``, where sample ``i`` is rows ``offsets[i]:offsets[i + 1]``.
            Float32 is rounded by the kernel to a 16-bit dtype of ``b``, as autocast did.
        b: gradients at its outputs, ``[n, T, d_out]`` or ``[N, d_out]``.
        P: directions ``[K, d_out, d_in]``; the kernel rounds them to the dtype of ``a``.
        P_bias: those of the bias ``[K, d_out]``, if it has one.
        offsets: integers ``[n + 1]`` from 0 to ``N``, ascending, on the same device; not checked, as that would wait for it.
        per_token: return ``[n, T, K]``, or ``[N, K]``, instead of ``[n, K]``.
        half: allow a CPU to round the operands of large float32 products to bfloat16.
        impl: ``triton`` (CUDA; float32, bfloat16, float16) or ``reference``; chosen by device and dtype by default.

    Sums are formed, and returned, in float32 (float64 for float64 inputs), in a fixed order. Raises ValueError naming the
    argument whose shape does not fit. docs/method.md, 4.1.
    """
    _check_layer(a, b, P, P_bias, offsets)
    return _run("contract", _contract_impl, a, b, P, P_bias, offsets, per_token, half, impl or _forced)


@torch.library.impl(_lib, "contract", "CompositeExplicitAutograd")
def _contract_impl(a, b, P, P_bias, offsets, per_token, half, impl):
    if _in_triton(impl, "contract", a, b, P):
        from adam_ghost.kernels.contract import contract as kernel

        with torch.cuda.device_of(a):
            scores = kernel(*_as_multiplied(a, b), P, offsets, per_token)
        if P_bias is None:
            return scores
        return with_bias(scores, b.to(P_bias.dtype) if per_token else sample_sums(b, offsets, P_bias.dtype), P_bias)
    a, b, P, P_bias = _wide(a, b, P, P_bias)
    if a.device.type == "cpu" and offsets is None and not (impl or per_token):
        return cpu.contract(a, b, P, P_bias, half)
    scores = definition.contract(a, b, P, P_bias)
    return scores if per_token else definition.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::contract", lib=_lib)
def _contract_fake(a, b, P, P_bias, offsets, per_token, half, impl):
    return a.new_empty(_scores_shape(a, offsets, per_token, P.shape[0]), dtype=_scores_dtype(a, b, P))


def contract_grouped(a: Tensor, b: Tensor, P: Tensor, ends: Tensor, *, impl: str | None = None) -> Tensor:
    """``sum over outputs of (a @ P[expert]) * b``: the score ``[N]`` of every row of a mixture's product, ``F.grouped_mm``.

    Args:
        a: rows sorted by expert ``[N, d_in]``; b: gradients at the product ``[N, d_out]``. Of 16 bits, as in ``contract``.
        P: a direction ``[E, d_in, d_out]``, in any strides; the kernel rounds it to the dtype of ``a``.
        ends: integers ``[E]``: where each expert's rows end, ascending, on the same device; not checked, as that would wait for it.
        impl: as in ``contract``.

    Rows past the last end are nobody's: 0. Dtypes, order and errors are those of ``contract``. docs/method.md, 4.1.
    """
    if ends.ndim != 1 or ends.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ends: expected integers [E], got {ends.dtype} {list(ends.shape)}")
    _check_shape("b", b, a.shape[0], P.shape[-1])
    _check_shape("P", P, len(ends), a.shape[-1], b.shape[-1])
    return _run("contract_grouped", _contract_grouped_impl, a, b, P, ends, impl or _forced)


@torch.library.impl(_lib, "contract_grouped", "CompositeExplicitAutograd")
def _contract_grouped_impl(a, b, P, ends, impl):
    if _in_triton(impl, "contract_grouped", a, b, P):
        from adam_ghost.kernels.grouped import contract_grouped as kernel

        with torch.cuda.device_of(a):
            return kernel(*_as_multiplied(a, b), P, ends)
    a, b, P = _wide(a, b, P)
    return definition.contract_grouped(a, b, P, ends)


@torch.library.register_fake("adam_ghost::contract_grouped", lib=_lib)
def _contract_grouped_fake(a, b, P, ends, impl):
    return a.new_empty(a.shape[0], dtype=_scores_dtype(a, b, P))


def with_bias(scores: Tensor | None, sums: Tensor, P_bias: Tensor) -> Tensor:
    """The weight's scores ``[..., K]``, if any, and those of the bias, from summed output gradients ``[..., d_out]``."""
    bias = sums @ P_bias.mT
    return bias if scores is None else scores.to(bias.dtype).add_(bias)


def sample_sums(b: Tensor, offsets: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[n, d]``: every sample's rows of ``b [n, T, d]``, or ``[N, d]`` with ``offsets``, summed in ``dtype``."""
    if offsets is None:
        return b.sum(1, dtype=dtype)
    return torch.segment_reduce(b.to(dtype), "sum", offsets=offsets)


def wgrad_score(
    a: Tensor, b: Tensor, P: Tensor, *, offsets: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """A linear layer's weight gradient ``b.T @ a`` over all tokens, ``[d_out, d_in]``, and its samples' scores ``[n, K]``.

    Args:
        a, b, P, offsets: as in ``contract``.
        impl: as in ``contract``; on CUDA the default is the faster of the fused kernel and a contraction beside the library's
            product, by the cost model.

    Accumulates in, and returns, float32 (float64 for float64 inputs), in a fixed order. Raises ValueError naming the argument
    whose shape does not fit. docs/method.md, 4.2.
    """
    _check_layer(a, b, P, None, offsets)
    return _run("wgrad_score", _wgrad_score_impl, a, b, P, offsets, impl or _forced)


@torch.library.impl(_lib, "wgrad_score", "CompositeExplicitAutograd")
def _wgrad_score_impl(a, b, P, offsets, impl):
    if _in_triton(impl, "wgrad_score", a, b, P):
        a, b = _as_multiplied(a, b)
        n = a.shape[0] if offsets is None else offsets.shape[0] - 1
        T = a.shape[-2] if offsets is None else a.shape[0] // max(n, 1)
        if impl == "triton" or cost.scores(n, T, *P.shape, itemsize=a.element_size()).best == "weight gradient":
            from adam_ghost.kernels.wgrad_score import wgrad_score as kernel

            with torch.cuda.device_of(a):
                return kernel(a, b, P, offsets)
        G = (b.flatten(0, -2).mT @ a.flatten(0, -2)).float()
        return G, contract(a, b, P, offsets=offsets, impl=impl)
    a, b, P = _wide(a, b, P)
    if a.device.type != "cpu" or impl == "reference":
        return definition.wgrad_score(a, b, P, offsets)
    return cpu.wgrad_score(a, b, P, offsets=offsets)


@torch.library.register_fake("adam_ghost::wgrad_score", lib=_lib)
def _wgrad_score_fake(a, b, P, offsets, impl):
    dtype = _scores_dtype(a, b, P)
    return a.new_empty(P.shape[1:], dtype=dtype), a.new_empty(_scores_shape(a, offsets, False, P.shape[0]), dtype=dtype)


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
    rounds scaled inputs to their dtype. Raises ValueError naming the argument whose shape does not fit. docs/method.md, 4.3.
    """
    if (a2 is None) != (b2 is None):
        raise ValueError(f"{'b2' if b2 is None else 'a2'}: expected both a2 and b2, or neither")
    if a2 is None and offsets2 is not None:
        raise ValueError("offsets2: expected None without a2 and b2")
    _check_tokens(offsets, {"a": a, "b": b})
    _check_tokens(offsets2, {"a2": a2, "b2": b2}, "offsets2")
    if a2 is not None and b2 is not None:
        _check_shape("a2", a2, *a2.shape[:-1], a.shape[-1])
        _check_shape("b2", b2, *b2.shape[:-1], b.shape[-1])
    _check_shape("row", row, b.shape[-1])
    _check_shape("col", col, a.shape[-1])
    return torch.ops.adam_ghost.ghost_gram(a, b, a2, b2, row, col, offsets, offsets2, impl or _forced)


@torch.library.impl(_lib, "ghost_gram", "CompositeExplicitAutograd")
def _ghost_gram_impl(a, b, a2, b2, row, col, offsets, offsets2, impl):
    tensors = [x for x in (a, b, a2, b2) if x is not None]
    if _in_triton(impl, "ghost_gram", *tensors):
        from adam_ghost.kernels.ghost_gram import ghost_gram as kernel

        a, b, a2, b2 = [*_alike(*tensors), None, None][:4]
        row, col = (x if x is None else x.float().contiguous() for x in (row, col))
        with torch.cuda.device_of(a):
            return kernel(a, b, a2, b2, row, col, offsets, offsets2)
    a, b, a2, b2, row, col = _wide(a, b, a2, b2, row, col)
    if a2 is None:
        a2, b2, offsets2 = a, b, offsets
    return definition.ghost_gram(a, b, a2, b2, row, col, offsets, offsets2)


@torch.library.register_fake("adam_ghost::ghost_gram", lib=_lib)
def _ghost_gram_fake(a, b, a2, b2, row, col, offsets, offsets2, impl):
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
    return _run("embedding_score", _embedding_score_impl, indices, b, P, padding_idx, offsets, per_token, impl or _forced)


@torch.library.impl(_lib, "embedding_score", "CompositeExplicitAutograd")
def _embedding_score_impl(indices, b, P, padding_idx, offsets, per_token, impl):
    if _in_triton(impl, "embedding_score", b, P):
        from adam_ghost.kernels.embedding import embedding_score as kernel

        with torch.cuda.device_of(b):
            return kernel(indices, b, P, padding_idx, offsets, per_token)
    b, P = _wide(b, P)
    scores = definition.embedding_score(indices, b, P, padding_idx)
    return scores if per_token else definition.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::embedding_score", lib=_lib)
def _embedding_score_fake(indices, b, P, padding_idx, offsets, per_token, impl):
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
        per_token, offsets, impl: as in ``contract``, and so are dtypes, order and errors. The kernel takes d up to ``LARGEST``.
    """
    if kind not in ("layer", "rms"):
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    _check_tokens(offsets, {"x": x, "b": b})
    _check_shape("b", b, *x.shape)
    _check_shape("P_weight", P_weight, None, x.shape[-1])
    _check_shape("P_bias", P_bias, *P_weight.shape)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _run("norm_score", _norm_score_impl, x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl or _forced)


@torch.library.impl(_lib, "norm_score", "CompositeExplicitAutograd")
def _norm_score_impl(x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl):
    if _in_triton(impl, "norm_score", x, b, P_weight):
        from adam_ghost.kernels import norm

        if impl == "triton" or x.shape[-1] <= norm.LARGEST:
            with torch.cuda.device_of(x):
                return norm.norm_score(x, b, P_weight, P_bias, eps, kind, offsets, per_token)
    x, b, P_weight, P_bias = _wide(x, b, P_weight, P_bias)
    scores = definition.norm_score(x, b, P_weight, P_bias, eps, kind)
    return scores if per_token else definition.sum_samples(scores, offsets)


@torch.library.register_fake("adam_ghost::norm_score", lib=_lib)
def _norm_score_fake(x, b, P_weight, P_bias, eps, kind, offsets, per_token, impl):
    return x.new_empty(_scores_shape(x, offsets, per_token, P_weight.shape[0]), dtype=_scores_dtype(x, b, P_weight, P_bias))
