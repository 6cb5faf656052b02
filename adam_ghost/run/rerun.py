"""A kept batch run again: the same inputs, random numbers and precision, at whatever weights the model holds now."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.calls import RngState, rng_state
from adam_ghost.capture.recording import Packing


@dataclass
class KeptBatch:
    """What it takes to run a micro-batch's forward pass again."""

    ids: list[Hashable]
    inputs: Any
    packing: Packing | None
    rng: RngState  # when the batch was announced
    rng_in_model: RngState | None = None  # when the model's forward pass began
    autocast: torch.dtype | None = None  # in the model's forward pass


def _set_rng(state: RngState) -> None:
    host, on_device, device = state
    torch.set_rng_state(host)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)


class Rerun:
    """Runs kept batches of ``model`` again by ``train_loss``; nothing of it stays but what the passes compute."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], train_loss: Callable[[Any], Tensor]):
        self.model, self.params, self.train_loss = model, list(params), train_loss
        self.device = self.params[0].device

    def keep(self, ids: list[Hashable], inputs: Any, packing: Packing | None) -> KeptBatch:
        """Called where the batch is announced."""
        return KeptBatch(ids, inputs, packing, rng_state(self.device))

    def note_forward(self, batch: KeptBatch) -> None:
        """Called where the model's forward pass begins."""
        batch.rng_in_model = rng_state(self.device)
        kind = self.device.type
        batch.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    @contextmanager
    def _as_then(self, batch: KeptBatch) -> Iterator[None]:
        """The random state and precision of the batch's own pass."""
        pending = [batch.rng_in_model]

        def begin(module: nn.Module, args: tuple) -> None:
            if pending and (state := pending.pop()) is not None:
                _set_rng(state)

        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(begin, prepend=True).remove)
            if batch.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, batch.autocast))
            _set_rng(batch.rng)
            yield

    def loss(self, batch: KeptBatch, inputs: Any = None) -> Tensor:
        """``train_loss`` of the batch (or of other ``inputs`` under its random numbers), with a graph."""
        with self._as_then(batch), torch.enable_grad():
            loss = self.train_loss(batch.inputs if inputs is None else inputs)
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"train_loss must return the scalar that the loop calls backward() on, with a graph; got {got}")
        return loss

    def gradient(self, batches: Sequence[KeptBatch]) -> list[Tensor]:
        """The gradient of the batches' losses by the parameters, summed as ``.grad`` sums them; zeros where there is none."""
        total: list[Tensor] | None = None
        for batch in batches:
            found = torch.autograd.grad(self.loss(batch), self.params, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)]
            total = grads if total is None else torch._foreach_add(total, grads)
        assert total is not None
        return total
