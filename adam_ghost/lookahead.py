"""Scores while gradients are formed: with ``P`` known before the backward pass, no layer call outlives its own backward.

Linear layers yield weight gradient and scores in one product; every other call is contracted when its gradient arrives.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adam_ghost import ops
from adam_ghost.calls import Call
from adam_ghost.capture import Recorder, Recording
from adam_ghost.contract import Directions, contract, sum_samples
from adam_ghost.layers import layer_kind


class ContractingRecording(Recording):
    """Contracts each call with ``P`` on arrival and keeps only the sum, ``[n, K]``; with ``keep`` the calls as well."""

    def __init__(self, P: Directions, offsets: Tensor | None = None, keep: bool = False):
        super().__init__(offsets)
        self.P, self.keep = P, keep
        self.scores: Tensor | None = None
        self._scored: set[int] = set()

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        if self.keep:
            super().receive(call, index, grad)
        params = [p for p in call.parameters() if id(p) in self.P]
        if params:
            scores = contract(call.with_gradient(index, grad), self.P, self.batch_size, self.offsets is not None)
            self.add(sum_samples(scores, self.offsets), params)

    def add(self, scores: Tensor, params: list[nn.Parameter]) -> None:
        if self.on_arrival is not None:
            self.on_arrival()
        self._scored.update(id(p) for p in params)
        self.scores = scores if self.scores is None else self.scores + scores

    def covered(self) -> set[int]:
        return self._scored - self.unattributed


class _ScoredLinear(torch.autograd.Function):
    """``x @ weight.T + bias``, whose backward pass also scores the samples: leading dimension of ``x``, or ``offsets``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recording: ContractingRecording, layer: nn.Module
    ) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # the backward pass runs without autocast: save what the product really saw
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        ctx.recording, ctx.layer = recording, layer
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        recording, layer = ctx.recording, ctx.layer
        d_input = grad @ weight if ctx.needs_input_grad[0] else None
        n, offsets = recording.batch_size, recording.offsets
        shape = (n, -1) if offsets is None else (-1,)
        a, b = x.reshape(*shape, x.shape[-1]), grad.reshape(*shape, grad.shape[-1])
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            P = recording.P[id(layer.weight)]
            d_weight, scores = ops.wgrad_score(a, b, P.mT if layer_kind(layer) == "conv1d" else P, offsets=offsets)
            recording.add(scores, [layer.weight])
        if ctx.needs_input_grad[2]:
            P = recording.P[id(layer.bias)]
            sums = b.sum(1, dtype=P.dtype) if offsets is None else torch.segment_reduce(b.to(P.dtype), "sum", offsets=offsets)
            recording.add(sums @ P.mT, [layer.bias])
            d_bias = sums.sum(0)
        return d_input, d_weight, d_bias, None, None


class ScoredLinears:
    """While attached, the model's linear layers score their samples in the weight gradient's product."""

    def __init__(self, model: nn.Module, recorder: Recorder):
        self.recorder = recorder
        self.layers = [m for m in model.modules() if layer_kind(m) in ("linear", "conv1d") and "forward" not in vars(m)]

    def attach(self) -> None:
        for layer in self.layers:
            layer.forward = _Forward(layer, self.recorder)

    def detach(self) -> None:
        for layer in self.layers:
            del layer.forward


class _Forward:
    """Stands in for one linear layer's forward."""

    def __init__(self, layer: nn.Module, recorder: Recorder):
        self.layer, self.recorder = layer, recorder

    def __call__(self, x: Tensor) -> Tensor:
        layer, recorder = self.layer, self.recorder
        recording = recorder.recording
        own = [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
        ours = isinstance(recording, ContractingRecording) and not recording.keep and recorder.active and torch.is_grad_enabled()
        tag = recorder.batch[x] if ours and own else None
        if tag is None or tag[0] != 0 or any(id(p) not in recording.P for p in own):
            return type(layer).forward(layer, x)
        recorder.scored = True
        weight = layer.weight.t() if layer_kind(layer) == "conv1d" else layer.weight
        return _ScoredLinear.apply(x, weight, layer.bias, recording, layer)
