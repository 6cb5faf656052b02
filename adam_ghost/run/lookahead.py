"""Scores while gradients are formed: with ``P`` known before the backward pass, no layer call outlives its own backward.

Linear layers yield weight gradient and scores in one product. The scores of these come as the gradient of ``slot``, a tensor of
zeros that each linear layer takes along: autograd itself adds them up, over layers, checkpoints and compiled graphs. Every other
call is contracted when its gradient arrives; on a CPU those of small linear layers, norms and embeddings wait until some
megabytes have come, and are contracted together.
"""

import weakref
from functools import partial

import torch
from torch import Tensor, nn

from adam_ghost.capture.calls import NO_GRADIENT, Call
from adam_ghost.capture.hooks import StandIn
from adam_ghost.capture.kinds import layer_kind
from adam_ghost.capture.recorder import Recorder, unseen
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.rows import Packing, Rows
from adam_ghost.processes.carried import Carried
from adam_ghost.scores import ops
from adam_ghost.scores.contract import score_calls
from adam_ghost.scores.forms import Asked, Directions
from adam_ghost.scores.linear import own_parameters, scored_linear
from adam_ghost.scores.shapes import add, in_line, lead_rows, owners
from adam_ghost.scores.together import TOGETHER, is_small

WAITING = 16 << 20  # bytes of inputs and gradients that wait to be contracted together


class ContractingRecording(Recording):
    """Contracts calls with ``P`` soon after arrival and keeps only the sum, ``[n, K]``; with ``keep`` the calls as well."""

    def __init__(self, P: Directions, n: int, packing: Packing | None = None, keep: bool = False):
        super().__init__(packing)
        self.P, self.keep = P, keep
        some = next(iter((P.parts if isinstance(P, Carried) else P).values()))
        dtype = torch.promote_types(some.dtype, torch.float32)
        self.slot = torch.zeros(n, len(some), dtype=dtype, device=some.device, requires_grad=True)
        # which holds nothing of ours: in a circle with its slot, the recording would keep P until garbage is collected
        self.slot.register_hook(partial(_comes, weakref.ref(self)))
        self._arrived: Tensor | None = None
        self._patient = not keep and not isinstance(P, Carried) and some.device.type == "cpu"
        self._waiting: list[Call] = []  # with their gradients
        self._bytes = 0  # of these, about
        self.scored: set[str] = set()  # names of the parameters that the scores cover
        self.reads: dict[str, torch.dtype] = {}  # of a linear layer's weight P is read in this dtype

    def _begins(self) -> None:
        super()._begins()
        if self._patient:  # what waits is contracted at the pass's end at the latest
            torch.autograd.Variable._execution_engine.queue_callback(self._contract_waiting)

    @property
    def scores(self) -> Tensor:
        """``[n, K]``, of all backward passes so far."""
        parts = [x for x in (self._arrived, self.slot.grad) if x is not None]
        return self.doubted(add(parts)) if parts else torch.zeros_like(self.slot)

    def receive(self, call: Call, index: int, grad: Tensor) -> None:
        self.comes()
        if self._patient and call.kind in TOGETHER and not call.grad_output:
            call.grad_output = {index: grad}
            self._waiting.append(call)
            self._bytes += 2 * grad.nbytes
            if self._bytes > WAITING:
                self._contract_waiting()
            return
        if self.keep:
            super().receive(call, index, grad)
        alone = call.with_gradient(index, grad)
        if isinstance(self.P, Carried):
            self.P.when_whole(self.P.keys() & call.parameters().keys(), partial(self._contract, [alone]))
        else:
            self._contract([alone])

    def _contract(self, calls: list[Call]) -> None:
        params = set().union(*(call.parameters() for call in calls))
        if not params <= self.P.keys():
            calls = [call for call in calls if not self.P.keys().isdisjoint(call.parameters())]
            params &= self.P.keys()
        self.scored |= params
        if self.reads:
            for call in calls:
                if call.kind != "embedding":  # which gathers rows of any dtype
                    for name in call.parameters().keys() & self.reads.keys():
                        self.read(name, torch.float32)
        if not calls or not self.batch_size:
            return
        # a backward pass under the loop's autocast would round the sums
        with torch.no_grad(), torch.autocast(self.slot.device.type, enabled=False, cache_enabled=False):
            parts = score_calls(calls, self.P, Asked(self.batch_size, self.packing))
        self._arrived = add(parts if self._arrived is None else [self._arrived, *parts])

    def _contract_waiting(self) -> None:
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            self._contract(waiting)
        for call in waiting:  # another pass may bring another gradient
            call.grad_output = NO_GRADIENT

    def read(self, name: str, dtype: torch.dtype) -> None:
        """A linear layer reads ``P`` of this weight in ``dtype``, or another layer does that shares it."""
        before = self.reads.setdefault(name, dtype)
        if before is not dtype:
            self.reads[name] = torch.promote_types(before, dtype)

    def close(self) -> None:
        """The scores were read: lets go of ``P``, which would stay as long as the loop keeps its loss, whose graph leads here."""
        self.P = {}

    def forget(self) -> None:
        super().forget()
        self._arrived = self.slot.grad = None
        for call in self._waiting:
            call.grad_output = NO_GRADIENT
        self._waiting, self._bytes = [], 0

    def touched(self) -> set[str]:
        return self.scored


def read_in(x: Tensor) -> torch.dtype:
    """What a linear layer reads ``P`` in, of its input or weight ``x``: its kernel rounds it to what the product's operands are."""
    kind = x.device.type
    if not ops.has_kernel("wgrad_score", x):
        return torch.float32
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _comes(recording: "weakref.ref[ContractingRecording]", grad: Tensor) -> None:
    if (here := recording()) is not None:
        here.comes()


class ScoredLinears:
    """While attached, the model's linear layers, but small ones, score their samples in the weight gradient's product."""

    def __init__(self, model: nn.Module, recorder: Recorder):
        self.recorder = recorder
        linears = [m for m in model.modules() if layer_kind(m) == "linear" and not is_small(m)]
        self.stand_ins = [StandIn(layer, partial(self._forward, layer)) for layer in linears]

    def attach(self) -> None:
        for stand_in in self.stand_ins:
            stand_in.attach()

    def detach(self) -> None:
        for stand_in in self.stand_ins:
            stand_in.detach()

    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        scored = None if self.recorder.recording is None else self._scored(layer, x)
        return type(layer).forward(layer, x) if scored is None else scored

    @unseen
    def _scored(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output with its scores to come; None where it goes the way of all layers, in the recorder's sight."""
        recorder = self.recorder
        recording = recorder.recording
        if not isinstance(recording, ContractingRecording) or recording.keep:
            return None
        if not recorder.active or not torch.is_grad_enabled() or not x.numel():
            return None
        names = [None if p is None else recorder.names.get(p, "") for p in own_parameters(layer)]  # of weight and bias
        trained = [name for name in names if name is not None]
        if not trained or x.ndim < 2 or any(name not in recording.P for name in trained):
            return None
        leads = recorder.leads(layer, x)
        tag = None if leads else recorder.told(x)
        if not leads and not (isinstance(tag, Rows) and tag.of.shape[-1] == 1):
            return None
        recorder.scored = True
        recording.scored.update(trained)
        if names[0] is not None:
            recording.read(names[0], read_in(x))

        def directions() -> tuple[Tensor | None, ...]:
            return tuple(None if name is None else recording.P[name] for name in names)

        P = directions if isinstance(recording.P, Carried) else directions()
        packing = recording.packing
        offsets, order = (None, None) if packing is None else (packing.offsets, packing.order)
        if isinstance(tag, Rows):
            samples, count = owners(lead_rows(x, tag), recorder.batch.n, packing)
            order, offsets = in_line(samples, count)
        if offsets is not None and order is not None:  # the last run is nobody's
            offsets = torch.cat([offsets, offsets.new_full((1,), len(order))])
        return scored_linear(layer, x, recording.slot, P, offsets, order)
