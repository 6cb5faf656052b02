"""A linear layer: its scores by one product of forward size, its samples' gradients, and the backward pass that scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.batch import Tag
from adam_ghost.capture.calls import Call
from adam_ghost.capture.declared import FOLLOWED
from adam_ghost.capture.kinds import is_transposed
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import cpu, ops
from adam_ghost.scores.forms import Asked, Directions, Form, register
from adam_ghost.scores.shapes import collect_rows, lead_rows, samples_first, samples_of, sum_samples, tokens


def scores(call: Call, P: Directions, asked: Asked) -> Tensor:
    weight, bias = call.directions(P, "weight", "bias")  # [K, d_out, d_in], [K, d_out]
    if weight is not None and is_transposed(call.fn):
        weight = weight.mT
    return product_scores(call.input, call.grad_output[0], call.outputs[0], weight, bias, asked)


def product_scores(a: Tensor, b: Tensor, tag: Tag, weight: Tensor | None, bias: Tensor | None, asked: Asked) -> Tensor:
    """Of inputs ``a [..., d_in]`` and output gradients ``b [..., d_out]``, for ``weight [K, d_out, d_in]``, ``bias [K, d_out]``."""
    if isinstance(tag, Rows):
        rows = _by_token(a.flatten(0, -2)[None], b.flatten(0, -2)[None], weight, bias, asked.half)[0]  # [M, K]
        return collect_rows(rows, lead_rows(b, tag), asked)
    a, b = (samples_first(x, tag, asked.n) for x in (a, b))  # [n, T, ..., d]
    packing = asked.packing
    if packing is not None and (asked.per_token or b.ndim > 3 or packing.order is not None or packing.tokens != b[..., 0].numel()):
        return sum_samples(_by_token(a, b, weight, bias, asked.half), packing)
    if asked.per_token:
        return _by_token(a, b, weight, bias, asked.half)
    # one sample, one run of rows
    first = 1 if packing is None else 0
    if b.ndim > first + 2:
        a, b = a.flatten(first, -2), b.flatten(first, -2)
    offsets = None if packing is None else packing.offsets
    if weight is None:
        assert bias is not None  # a call without either is not scored
        return ops.with_bias(None, ops.sample_sums(b, offsets, bias.dtype), bias)
    return ops.contract(a, b, weight, bias, offsets=offsets, half=asked.half)


def _by_token(a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, half: bool) -> Tensor:
    a, b_in_line = a.flatten(1, -2), b.flatten(1, -2)
    if weight is None:
        assert bias is not None
        return tokens(ops.with_bias(None, b_in_line.to(bias.dtype), bias), b)
    return tokens(ops.contract(a, b_in_line, weight, bias, per_token=True, half=half), b)


def sample_gradients(call: Call, name: str, asked: Asked, block: slice) -> Tensor:
    weight, bias = call.fn.weight, call.fn.bias
    dtype, tag, n = torch.promote_types(weight.dtype, torch.float32), call.outputs[0], asked.samples
    a, b = call.input.to(dtype), call.grad_output[0].to(dtype)
    if isinstance(tag, Rows) or asked.packing is not None:
        of = samples_of(b, tag, asked).expand(*b.shape[:-1], 1).reshape(-1)  # [M]
        owners = of == torch.arange(n, device=b.device).unsqueeze(1)  # [n, M]
        a, b = (x.flatten(0, -2).expand(n, -1, -1) for x in (a, b))
        b = b * owners.unsqueeze(-1)
    else:
        a, b = (samples_first(x, tag, n).flatten(1, -2) for x in (a, b))  # [n, T, d]
    if name == call.name_of(bias):
        return b.sum(1)[:, block]
    rows, columns = (a, b) if is_transposed(call.fn) else (b, a)
    return rows[..., block].mT @ columns


register("linear", Form(scores, sample_gradients))


class _ScoredLinear(torch.autograd.Function):
    """``x @ weight.T + bias``; the gradient of ``slot [n, K]`` is the samples' scores.

    Samples are the leading dimension of ``x``, in equal shares, or ``offsets`` into its tokens, taken in ``order``, of which the
    last run is nobody's. ``P``: ``[K, *shape]``; or ``late`` gives them in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slot: Tensor,
        P_weight: Tensor | None,
        P_bias: Tensor | None,
        offsets: Tensor | None,
        order: Tensor | None,
        late: Callable[[], tuple[Tensor | None, Tensor | None]] | None,
    ) -> Tensor:
        # casts as autocast makes them, but the gradients of the weights come back as wide as their sums are
        seen = weight
        if torch.is_autocast_enabled(x.device.type):
            seen, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, seen, P_weight, P_bias, offsets, order)
        ctx.n, ctx.dtype, ctx.late = slot.shape[0], weight.dtype, late
        out = cpu.linear(x, seen, bias)
        # a view made here could not be changed in place, as an activation after the layer may do
        return torch.ops.aten._unsafe_view(out, out.shape) if not torch.compiler.is_compiling() and out._is_view() else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, P_weight, P_bias, offsets, order = ctx.saved_tensors
        if ctx.late is not None:
            P_weight, P_bias = ctx.late()
        d_input = None
        if ctx.needs_input_grad[0]:
            d_input = cpu.linear(grad, weight.t())
        shape = (ctx.n, -1) if offsets is None else (-1,)
        a, b = x.reshape(*shape, x.shape[-1]), grad.reshape(*shape, grad.shape[-1])
        if order is not None:
            a, b = a[order], b[order]
        d_weight = d_bias = None
        scores = None
        if ctx.needs_input_grad[1]:
            d_weight, scores = ops.wgrad_score(a, b, P_weight, offsets=offsets)
            d_weight = d_weight if d_weight.dtype == ctx.dtype else d_weight.to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            sums = ops.sample_sums(b, offsets, P_bias.dtype)  # [n, d_out]
            scores, d_bias = ops.with_bias(scores, sums, P_bias), sums.sum(0)
        if order is not None and scores is not None:
            scores = scores[: ctx.n]
        return d_input, d_weight, d_bias, scores, None, None, None, None, None


FOLLOWED.add(_ScoredLinear)
_apply: Any = _ScoredLinear.apply


def scored_linear(
    layer: nn.Module,
    x: Tensor,
    slot: Tensor,
    P: tuple[Tensor | None, ...] | Callable[[], tuple[Tensor | None, ...]],
    offsets: Tensor | None,
    order: Tensor | None = None,
) -> Tensor:
    """The layer's forward, whose backward adds the samples' scores to the gradient of ``slot [n, K]``.

    ``P`` of weight and bias, or what gives them in the backward pass.
    """
    weight: Any = layer.weight  # nn.Module types its attributes as modules too
    bias: Any = layer.bias
    transposed = is_transposed(layer)
    weight = weight.t() if transposed else weight

    def directions(P: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None]:
        P_weight, P_bias = P
        return P_weight.mT if transposed and P_weight is not None else P_weight, P_bias

    late = None
    if callable(P):
        found = P
        late, (P_weight, P_bias) = lambda: directions(found()), (None, None)
    else:
        P_weight, P_bias = directions(P)
    if torch.is_autocast_enabled(x.device.type):
        # a cast that autograd sees: the backward pass runs without autocast, on what the product really saw
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _apply(x, weight, bias, slot, P_weight, P_bias, offsets, order, late)


def own_parameters(layer: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The layer's weight and bias, None where it has none or it is frozen."""
    weight, bias = (getattr(layer, name, None) for name in ("weight", "bias"))
    return (
        weight if weight is not None and weight.requires_grad else None,
        bias if bias is not None and bias.requires_grad else None,
    )
