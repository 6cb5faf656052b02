"""Lookahead in models under torch.compile: no hooks, no graph breaks; every score is the gradient of ``slot``.

Linear layers score in the weight gradient's product. A layer that is linear in its parameters adds ``slot * layer_P(x)``,
which is zero and whose derivative by ``slot`` is the score. What it takes from Python is constant while the model runs.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from adam_ghost.capture.hooks import StandIn
from adam_ghost.capture.kinds import layer_kind
from adam_ghost.run.lookahead import ContractingRecording
from adam_ghost.scores.linear import own_parameters, scored_linear


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of ``model`` is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    return any(isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())


class _Site:
    """One layer, and what the forward pass now running needs to score it."""

    def __init__(self, layer: nn.Module, names: dict[Tensor, str]):
        self.layer, self.kind = layer, layer_kind(layer)
        self.names = tuple(None if p is None else names[p] for p in own_parameters(layer))
        self.stand_in = StandIn(layer, partial(_forward, self))
        self.slot: Tensor | None = None
        self.P: tuple[Tensor | None, ...] = ()
        self.seen = False  # whether it scored


class CompiledLayers:
    """While attached, the layers of a compiled model score their samples, if these are the leading dimension."""

    def __init__(self, model: nn.Module):
        layers = [m for m in model.modules() if _has_form(m)]
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.sites = [_Site(m, names) for m in layers if any(p is not None for p in own_parameters(m))]

    def attach(self) -> None:
        for site in self.sites:
            site.stand_in.attach()

    def detach(self) -> None:
        for site in self.sites:
            site.stand_in.detach()

    def begin(self, recording: ContractingRecording) -> None:
        """The forward passes from now on belong to ``recording``."""
        for site in self.sites:
            site.slot, site.seen = recording.slot, False
            site.P = tuple(None if name is None else recording.P[name] for name in site.names)

    def end(self, recording: ContractingRecording) -> None:
        """No forward pass is scored from now on."""
        for site in self.sites:
            site.slot = None
            if site.seen:
                recording.scored.update(name for name in site.names if name is not None)


def _has_form(module: nn.Module) -> bool:
    """Whether the layer is one that ``_forward`` can score."""
    kind = layer_kind(module)
    if kind is None:
        return False
    if kind == "embedding":
        return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, _ConvNd):
        return not module.transposed
    return kind in ("linear", "norm") or isinstance(module, nn.GroupNorm)


def _forward(site: _Site, x: Tensor) -> Tensor:
    layer: Any = site.layer  # nn.Module types its attributes as modules too
    slot = site.slot
    # an embedding of a plain list of indices may be one of positions, without samples: it is left to be named as not covered
    without = x.shape[0] != (0 if slot is None else len(slot)) or (site.kind == "embedding" and x.ndim == 1)
    if slot is None or without or not torch.is_grad_enabled():
        return type(layer).forward(layer, x)
    site.seen = True
    if site.kind == "linear":
        return scored_linear(layer, x, slot, site.P, None)
    y = type(layer).forward(layer, x)
    for k in range(slot.shape[1]):
        weight, bias = (None if p is None else p[k] for p in site.P)
        q = _run_with(layer, x, torch.zeros_like(layer.weight) if weight is None else weight, bias)
        y = y + (slot[:, k].view(-1, *[1] * (q.ndim - 1)) * q).to(y.dtype)
    return y


def _run_with(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's own forward with other parameters, in their dtype."""
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    x = x.to(weight.dtype)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return F.rms_norm(x, layer.normalized_shape, weight, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    return layer._conv_forward(x, weight, bias)
