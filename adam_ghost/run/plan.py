"""What a compiled model does to the batch: nobody sees its functions, so its own code runs once in eager mode and is followed."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adam_ghost.capture.batch import Blocks, Followed
from adam_ghost.capture.calls import Call
from adam_ghost.capture.recorder import Recorder
from adam_ghost.capture.recording import Recording


class Plan(Recorder):
    """One forward pass followed, nothing recorded: which layers always have the samples as leading dimension, in and out.

    The model's random state and buffers are as before; what else its Python code changes, it changes once more. Layers that
    only other values of the arguments lead to were not met and are not in ``led``.

    Attributes:
        led: for each layer met, whether in all of its calls row ``i`` is sample ``i``.
        unattributed: names of the parameters used in any other way.
        batch_size: of the arguments.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict):
        super().__init__(model)
        self.led: dict[nn.Module, bool] = {}
        self.unattributed: set[str] = set()
        recording = Recording()
        buffers = [(x, x._version, x.detach().clone()) for x in model.buffers()]
        held = [(m, dict(m._buffers)) for m in model.modules() if m._buffers]  # a forward pass may replace them
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        self.attach()
        try:
            with (
                torch.random.fork_rng(devices),
                torch.compiler.set_stance("force_eager"),
                torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing),  # there will be no backward pass
            ):
                self.begin(recording)
                try:
                    model(*args, **kwargs)
                finally:
                    self.end()
        finally:
            self.detach()
            for module, own in held:
                module._buffers.update(own)
            with torch.no_grad():
                for x, version, before in buffers:
                    if x._version != version:
                        x.copy_(before)
        self.batch_size = recording.batch_size
        self.unattributed |= recording.unattributed
        self._reset()

    def _classify(
        self,
        call: Call,
        tensors: list[Tensor],
        outs: list[Any],
        place: Callable[[int, Tensor], Followed | None],
        aliased: Sequence[Tensor] = (),
    ) -> None:
        super()._classify(call, tensors, outs, place, aliased)
        tags = [self.batch[x] for x in (tensors[0], *outs) if isinstance(x, Tensor)]
        if isinstance(call.fn, nn.Module):
            self.led[call.fn] = self.led.get(call.fn, True) and set(tags) == {Blocks(0, 1)}
        else:
            self.unattributed.update(call.parameters())

    def _watch(self, call: Call, index: int, out: Tensor, tag: Followed | None, inputs: Sequence[Tensor] = ()) -> None:
        self.batch.tag(out, tag)
        self.sources.pop(out, None)


def _nothing(saved: Any) -> Any:
    """In place of what a backward pass would need."""
    return None


def kind_of_step(model: nn.Module, args: tuple, kwargs: dict) -> Hashable:
    """What one plan serves: modes, the parameters that are trained, and the arguments' shapes, types and plain values."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (x.shape, x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x if isinstance(x, Hashable) else type(x)
        for x in leaves
    )
    modes = tuple(m.training for m in model.modules())
    return described, repr(spec), modes, tuple(p.requires_grad for p in model.parameters())
