"""Scores while gradients are formed: with ``P`` known before the backward pass, no layer call outlives its own backward.

Linear layers yield weight gradient and scores in one product; every other call is contracted when its gradient arrives.
The scores come as the gradient of ``slot``, a tensor of zeros that each linear layer takes along: autograd itself adds them
up, over layers, checkpoints and compiled graphs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost import cpu, ops
from adam_ghost.calls import Call
from adam_ghost.capture import Recorder, Recording, unseen
from adam_ghost.contract import Directions, contract, sum_samples
from adam_ghost.layers import layer_kind


class ContractingRecording(Recording):
    """Contracts each call with ``P`` on arrival and keeps only the sum, ``[n, K]``; with ``keep`` the calls as well."""

    def __init__(self, P: Directions, n: int, offsets: Tensor | None = None, keep: bool = False):
        super().__init__(offsets)
        self.P, self.keep = P, keep
        some = next(iter(P.values()))
        self.slot = some.new_zeros(n, len(some)).requires_grad_()
        self.slot.register_hook(lambda grad: self._tell())
        self._arrived: Tensor | None = None
        self.scored: set[int] = set()  # parameters, by id, that the scores cover

    def _tell(self) -> None:
        if self.on_arrival is not None:
            self.on_arrival()

    @property
    def scores(self) -> Tensor:
        """``[n, K]``, of all backward passes so far."""
        parts = [x for x in (self._arrived, self.slot.grad) if x is not None]
        return sum(parts) if parts else torch.zeros_like(self.slot)

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        self._tell()
        if self.keep:
            super().receive(call, index, grad)
        params = [p for p in call.parameters() if id(p) in self.P]
        if not params:
            return
        scores = contract(call.with_gradient(index, grad), self.P, self.batch_size, self.offsets is not None)
        scores = sum_samples(scores, self.offsets)
        self._arrived = scores if self._arrived is None else self._arrived + scores
        self.scored.update(id(p) for p in params)

    def covered(self) -> set[int]:
        return self.scored - self.unattributed


class _ScoredLinear(torch.autograd.Function):
    """``x @ weight.T + bias``; the gradient of ``slot [n, K]`` is the samples' scores.

    Samples are the leading dimension of ``x``, in equal shares, or ``offsets`` into its tokens. ``P``: ``[K, *shape]``.
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
    ) -> Tensor:
        ctx.save_for_backward(x, weight, P_weight, P_bias, offsets)
        ctx.n = len(slot)
        return cpu.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, P_weight, P_bias, offsets = ctx.saved_tensors
        d_input = None
        if ctx.needs_input_grad[0]:
            d_input = cpu.linear(grad, weight.t())
        shape = (ctx.n, -1) if offsets is None else (-1,)
        a, b = x.reshape(*shape, x.shape[-1]), grad.reshape(*shape, grad.shape[-1])
        d_weight = d_bias = None
        scores: Tensor | int = 0
        if ctx.needs_input_grad[1]:
            d_weight, scores = ops.wgrad_score(a, b, P_weight, offsets=offsets)
        if ctx.needs_input_grad[2]:
            b = b.to(P_bias.dtype)
            sums = b.sum(1) if offsets is None else torch.segment_reduce(b, "sum", offsets=offsets)  # [n, d_out]
            scores, d_bias = scores + sums @ P_bias.mT, sums.sum(0)
        return d_input, d_weight, d_bias, scores, None, None, None


def scored_linear(layer: nn.Module, x: Tensor, slot: Tensor, P: tuple[Tensor | None, ...], offsets: Tensor | None) -> Tensor:
    weight, bias, P_weight = layer.weight, layer.bias, P[0]
    if layer_kind(layer) == "conv1d":
        weight, P_weight = weight.t(), None if P_weight is None else P_weight.mT
    if torch.is_autocast_enabled(x.device.type):
        # casts that autograd sees: the backward pass runs without autocast, on what the product really saw
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    return _ScoredLinear.apply(x, weight, bias, slot, P_weight, P[1], offsets)


def own_parameters(layer: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """The layer's weight and bias, None where it has none or it is frozen."""
    return tuple(p if p is not None and p.requires_grad else None for p in (layer.weight, getattr(layer, "bias", None)))


class ScoredLinears:
    """While attached, the model's linear layers score their samples in the weight gradient's product."""

    def __init__(self, model: nn.Module, recorder: Recorder):
        self.recorder = recorder
        self.layers = [m for m in model.modules() if layer_kind(m) in ("linear", "conv1d") and "forward" not in vars(m)]

    def attach(self) -> None:
        for layer in self.layers:
            layer.forward = partial(self._forward, layer)

    def detach(self) -> None:
        for layer in self.layers:
            del layer.forward

    @unseen
    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        recorder = self.recorder
        recording = recorder.recording
        own = [p for p in own_parameters(layer) if p is not None]
        ours = isinstance(recording, ContractingRecording) and not recording.keep and recorder.active and torch.is_grad_enabled()
        tag = recorder.batch[x] if ours and own else None
        if tag is None or tag[0] != 0 or any(id(p) not in recording.P for p in own):
            return type(layer).forward(layer, x)
        recorder.scored = True
        recording.scored.update(id(p) for p in own)
        P = tuple(None if p is None else recording.P[id(p)] for p in own_parameters(layer))
        return scored_linear(layer, x, recording.slot, P, recording.offsets)
