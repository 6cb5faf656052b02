"""Lookahead in models under torch.compile: no hooks, no graph breaks; every score is the gradient of ``slot``.

Linear layers score in the weight gradient's product. A layer that is linear in its parameters adds ``slot * layer_P(x)``,
which is zero and whose derivative by ``slot`` is the score. What it takes from Python is constant while the model runs.
"""

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from adam_ghost.capture.hooks import Hook, StandIn
from adam_ghost.capture.kinds import is_plain_lookup, layer_kind
from adam_ghost.run.lookahead import ContractingRecording, read_in
from adam_ghost.run.plan import Plan, kind_of_step
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
        self.led = False  # whether its samples are known to be the leading dimension
        self.seen = self.missed = False  # whether it scored, and whether a call went without


class CompiledLayers:
    """While attached, the layers of a compiled model score their samples, where a plan shows these to be the leading dimension.

    Before the first forward pass of each kind (modes, shapes) the model runs once in eager mode, for the plan. Where something is
    compiled in a later one, the model ran other code than the plan is of (a flag was set, a branch taken): that pass cannot be
    scored, and from then on every pass is planned.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        layers = [m for m in model.modules() if _has_form(m)]
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self.sites = [_Site(m, names) for m in layers if any(p is not None for p in own_parameters(m))]
        self._plans: dict[Hashable, Plan] = {}
        self._planning = False
        self._settled = True  # whether passes of a kind have all run the same code
        self._compilations: int | None = None  # before the pass now running; None: its plan is of this very pass
        self._recording: ContractingRecording | None = None
        self._handles: list[Any] = []
        self._compiled_call: Any = None

    def attach(self) -> None:
        for site in self.sites:
            site.stand_in.attach()
        self._compiled_call = self.model._compiled_call_impl
        if self._compiled_call is None:
            self._handles = [
                self.model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
                self.model.register_forward_hook(Hook(self._after_forward)),
            ]
        else:  # by ``model.compile()``, which compiles the model's hooks as well
            self.model._compiled_call_impl = self._call

    def detach(self) -> None:
        for site in self.sites:
            site.stand_in.detach()
        if self._compiled_call is None:
            for handle in self._handles:
                handle.remove()
        else:
            self.model._compiled_call_impl = self._compiled_call

    def begin(self, recording: ContractingRecording) -> None:
        """The forward passes from now on belong to ``recording``."""
        self._recording = recording
        for site in self.sites:
            site.slot, site.seen, site.missed, site.led = recording.slot, False, False, False
            site.P = tuple(None if name is None else recording.P[name] for name in site.names)

    def end(self, recording: ContractingRecording) -> None:
        """No forward pass is scored from now on."""
        self._recording = None
        for site in self.sites:
            site.slot = None
            names = {name for name in site.names if name is not None}
            if site.seen:
                recording.scored |= names
            if site.missed:
                recording.unattributed |= names

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        self._before_forward(self.model, args, kwargs)
        output = self._compiled_call(*args, **kwargs)
        self._after_forward(self.model, args, output)
        return output

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        recording = self._recording
        if recording is None or self._planning or not torch.is_grad_enabled():
            return
        kind = kind_of_step(self.model, args, kwargs)
        known = self._settled and kind in self._plans
        if not known:
            self._plans[kind] = self._plan(args, kwargs)
        self._compilations = _compilations() if known else None
        plan, rows = self._plans[kind], len(recording.slot)
        if plan.batch_size != rows:
            raise ValueError(f"run.batch got {rows} ids, but the model was called with a batch of {plan.batch_size}")
        recording.unattributed |= plan.unattributed
        for site in self.sites:
            site.led = plan.led.get(site.layer, False)
        self._round(recording)
        if not any(site.led for site in self.sites):
            raise ValueError("in no layer of the compiled model can its samples be told apart: there is nothing to attribute")

    def _round(self, recording: ContractingRecording) -> None:
        """``P`` of weights as its kernel reads them, from the first pass on: in another dtype the model is compiled again."""
        sites = [(site, site.names[0]) for site in self.sites]
        weights = [(site, name) for site, name in sites if name is not None]
        for site, name in weights:
            if site.led and site.kind == "linear":
                weight: Any = site.layer.weight
                recording.read(name, read_in(weight))
        for site, name in weights:
            if site.kind not in ("linear", "embedding") and name in recording.reads:
                recording.read(name, torch.float32)
        for site, name in weights:
            if recording.reads.get(name) == torch.bfloat16:
                site.P = (recording.P[name].to(torch.bfloat16), *site.P[1:])

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        before, self._compilations = self._compilations, None
        if self._recording is None or before is None or _compilations() == before:
            return
        self._settled = False
        self._recording.deviation = (
            "the compiled model ran other code than in earlier steps of its kind: this step has no scores; before later ones it"
            " runs once in eager mode"
        )

    def _plan(self, args: tuple, kwargs: dict) -> Plan:
        slots = [site.slot for site in self.sites]
        self._planning = True
        try:
            for site in self.sites:
                site.slot = None
            return Plan(self.model, args, kwargs)
        finally:
            self._planning = False
            for site, slot in zip(self.sites, slots, strict=True):
                site.slot = slot


def _compilations() -> int:
    """How many pieces of code torch.compile has taken up so far."""
    return torch._dynamo.utils.counters["frames"]["total"]


def _has_form(module: nn.Module) -> bool:
    """Whether the layer is one that ``_forward`` can score."""
    kind = layer_kind(module)
    if kind is None:
        return False
    if kind == "embedding":
        return is_plain_lookup(module)
    if isinstance(module, _ConvNd):
        return not module.transposed
    return kind in ("linear", "norm") or isinstance(module, nn.GroupNorm)


def _forward(site: _Site, x: Tensor) -> Tensor:
    layer: Any = site.layer  # nn.Module types its attributes as modules too
    slot = site.slot
    if slot is None or not torch.is_grad_enabled():
        return type(layer).forward(layer, x)
    if not site.led:
        site.missed = True
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
