"""Calls of known layers, contracted by one call of the extension, whose product is never in memory."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from adam_ghost import extension
from adam_ghost.capture.calls import Call
from adam_ghost.capture.kinds import is_transposed
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import cpu, ops
from adam_ghost.scores.forms import Asked, Directions

TOGETHER = ("linear", "norm", "embedding")  # kinds of layers
_LINEAR, _LAYER_NORM, _RMS_NORM, _EMBEDDING = range(4)  # in the order of csrc/calls.h
SMALL = 2**14  # elements of a linear layer's weight up to which its calls are contracted so, whatever their tokens
LARGEST = 2**20  # elements of a linear layer's weight from which on the library's product is as fast
PLAIN = 2**22  # multiplications from which on it is faster where the extension knows no vector instructions of the processor's
EVERY = 2**62  # multiplications: more than any call has

Told = tuple[int, Tensor, Tensor, Tensor | None, Tensor | None, float, int]


def is_small(layer: nn.Module) -> bool:
    """Whether calls of a linear layer are better contracted with those of others than where its gradient is formed."""
    weight: Any = layer.weight  # nn.Module types its attributes as modules too
    plain = weight.device.type == "cpu" and weight.element_size() >= 4
    return bool(plain and weight.numel() <= SMALL and not extension.reason("cpu"))


def score_together(calls: list[Call], P: Directions, asked: Asked) -> tuple[Tensor | None, list[Call]]:
    """The scores ``[n, K]`` of those of the calls that the extension takes, summed, and the calls that are left.

    It takes float32 on the CPU, samples along dimension 0. Products and sums over features are float32, over tokens and layers
    float64, in a fixed order. Where ``asked.half`` allows it, ``P`` and output gradient of large products are rounded to bfloat16.
    """
    if asked.packing is not None or asked.per_token or asked.n == 0:
        return None, calls
    if any(grad.device.type != "cpu" for call in calls[:1] for grad in call.grad_output.values()):
        return None, calls
    if extension.reason("cpu") or ops.forced() or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None, calls
    found: list[Told] = []
    taken: list[Call] = []
    left: list[Call] = []
    for call in calls:
        told = _told(call, P)
        if told is None:
            left.append(call)
        else:
            found.append(told)
            taken.append(call)
    # of these layers: where fully_shard keeps parts, others' directions need not be there
    some = next((x for _, _, _, weight, bias, *_ in found for x in (weight, bias) if x is not None), None)
    if some is None or some.dtype != torch.float32 or some.device.type != "cpu":
        return None, calls
    sums = torch.zeros(asked.n, len(some), dtype=torch.float64)
    refused = extension.C.contract_calls(found, sums, LARGEST, *_products(asked.half))
    if len(refused) == len(found):
        return None, calls
    return sums.float(), [*left, *(taken[i] for i in refused)]


@functools.cache
def _products(half: bool) -> tuple[int, int]:
    """Multiplications above which a linear call is left to the library, and from which on the extension rounds operands."""
    if extension.built["cpu"] == "baseline":
        return PLAIN, EVERY
    rounds = extension.built["cpu_bfloat16"] and not torch.cpu.get_capabilities().get("amx_bf16")  # the library's tiles are faster
    return (EVERY, cpu.LARGE if half else EVERY) if rounds or not half else (cpu.LARGE, EVERY)


def _told(call: Call, P: Directions) -> Told | None:
    """What the extension is told of a call: kind, input, output gradient, directions, epsilon and index of padding."""
    tag, layer = call.outputs.get(0), call.fn
    if tag is None or isinstance(tag, Rows) or tag[0] != 0 or len(call.grad_output) != 1:
        return None
    eps, padding = 0.0, -1
    if call.kind == "linear":
        kind = _LINEAR
    elif call.kind == "norm" and len(layer.normalized_shape) == 1:
        kind = _LAYER_NORM if isinstance(layer, nn.LayerNorm) else _RMS_NORM
        eps = torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
    elif call.kind == "embedding" and not layer.scale_grad_by_freq:
        kind, padding = _EMBEDDING, -1 if layer.padding_idx is None else layer.padding_idx
    else:
        return None
    weight, bias = call.directions(P, "weight", "bias")
    if weight is not None and kind == _LINEAR and is_transposed(layer):
        weight = weight.mT
    return kind, call.input, call.grad_output[0], weight, bias, eps, padding
