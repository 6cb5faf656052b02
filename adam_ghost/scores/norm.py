"""A layer or RMS norm: one fused kernel where there is one; elsewhere its own forward, with P as its parameters, is as fast."""

from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.calls import Call
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import anything, cpu, ops
from adam_ghost.scores.forms import Asked, Directions, Form, register
from adam_ghost.scores.shapes import collect_rows, lead_rows, samples_first, sum_samples, tokens


def scores(call: Call, P: Directions, asked: Asked) -> Tensor:
    module = call.fn
    weight, bias = call.directions(P, "weight", "bias")  # [K, d]
    if weight is None:
        return anything.scores(call, P, asked)
    kind, tag = "layer" if isinstance(module, nn.LayerNorm) else "rms", call.outputs[0]
    if len(module.normalized_shape) > 1 or not ops.has_kernel("norm_score", call.input, call.grad_output[0]):
        plain = asked.packing is None and not asked.per_token and tag == (0, 1)
        return _run_with(module, call.input, call.grad_output[0], weight, bias) if plain else anything.scores(call, P, asked)
    x, b = call.input, call.grad_output[0]
    if isinstance(tag, Rows):
        x, b = (t.reshape(1, -1, t.shape[-1]) for t in (x, b))
        found = ops.norm_score(x, b, weight, bias, module.eps, kind, per_token=True)[0]  # [M, K]
        return collect_rows(found, lead_rows(call.grad_output[0], tag), asked)
    x, b = (samples_first(t, tag, asked.n) for t in (x, b))  # [n, T, ..., d]
    per_token = asked.per_token or asked.packing is not None
    found = ops.norm_score(x.flatten(1, -2), b.flatten(1, -2), weight, bias, module.eps, kind, per_token=per_token)
    if not per_token:
        return found
    found = tokens(found, b)
    return found if asked.packing is None else sum_samples(found, asked.packing)


def _run_with(module: Any, x: Tensor, b: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[n, K]``: the layer with its parameters replaced by each direction, times the output gradients."""
    x, b = (t if t.dtype == weight.dtype else t.to(torch.promote_types(t.dtype, weight.dtype)) for t in (x, b))
    found, flat = [], b.reshape(b.shape[0], -1)
    for k in range(weight.shape[0]):
        if isinstance(module, nn.LayerNorm):
            y = torch.layer_norm(x, module.normalized_shape, weight[k], None if bias is None else bias[k], module.eps)
        else:
            y = torch.rms_norm(x, module.normalized_shape, weight[k], module.eps)
        found.append(cpu.dots(y, flat))
    return torch.stack(found, 1)


register("norm", Form(scores))
