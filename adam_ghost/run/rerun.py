"""A kept batch run again: the same inputs, random numbers and precision, at whatever weights the model holds now."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adam_ghost.capture.calls import RngState, rng_state
from adam_ghost.capture.recording import Packing


@dataclass
class KeptBatch:
    """What it takes to run a micro-batch's forward pass again."""

    ids: Sequence[Hashable]
    inputs: Any
    packing: Packing | None
    rng: RngState  # when the batch was announced
    rng_in_model: RngState | None = None  # when the model's forward pass began
    autocast: torch.dtype | None = None  # in the model's forward pass
    first_row: Tensor | None = None  # [], norm of the gradient that came to the first row of the model's output


def _set_rng(state: RngState) -> None:
    host, on_device, device = state
    torch.set_rng_state(host)
    if device is not None and on_device is not None:
        torch.cuda.set_rng_state(on_device, device)


class Rerun:
    """Runs kept batches of ``model`` again by ``train_loss``; nothing of it stays but what the passes compute."""

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], train_loss: Callable[[Any], Tensor]):
        self.model, self.train_loss = model, train_loss
        self.names, self.params = list(params), list(params.values())
        self.device = self.params[0].device

    def keep(self, ids: Sequence[Hashable], inputs: Any, packing: Packing | None) -> KeptBatch:
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
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"train_loss must return the scalar that the loop calls backward() on, got {got}")
        return loss

    @property
    def head(self) -> nn.Module:
        """The module whose output is the model's, also where the model's own call returns the loss."""
        embeddings = getattr(self.model, "get_output_embeddings", lambda: None)()
        return self.model if embeddings is None else embeddings

    def some_rows(self, batch: KeptBatch, share: float) -> Tensor:
        """Indices of evenly spaced rows, the first among them; all, where rows are not samples."""
        n = len(batch.ids)
        if batch.packing is not None:
            return torch.arange(n, device=self.device)
        return torch.arange(0, n, max(1, int(1 / share)), device=self.device)

    def loss_and_output(self, batch: KeptBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``train_loss`` of some rows of a batch, and what the model made of them: ``[rows, ...]``.

        Raises ValueError where the output does not have the batch along its first dimension.
        """
        n, seen = len(batch.ids), []
        alike = lambda x: isinstance(x, Tensor) and x.ndim > 0 and len(x) == n and batch.packing is None  # noqa: E731
        inputs = pytree.tree_map(lambda x: x[rows.to(x.device)] if alike(x) else x, batch.inputs)
        handle = self.head.register_forward_hook(lambda module, args, output: seen.append(first_output(output)))
        try:
            loss = self.loss(batch, inputs) if torch.is_grad_enabled() else self._value(batch, inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0] is None or seen[0].ndim < 2 or (batch.packing is None and len(seen[0]) != len(rows)):
            raise ValueError(
                "feedback='gauss-newton' needs a model that is called once per batch and whose output has the batch as its"
                " first dimension; use feedback='differences'"
            )
        return loss, seen[0]

    def _value(self, batch: KeptBatch, inputs: Any) -> Tensor:
        with self._as_then(batch), torch.no_grad():
            return self.train_loss(inputs)

    def gradient(self, batches: Sequence[KeptBatch]) -> list[Tensor]:
        """The gradient of the batches' losses by the parameters, summed as ``.grad`` sums them; zeros where there is none."""
        total: list[Tensor] | None = None
        for batch in batches:
            found = torch.autograd.grad(self.loss(batch), self.params, allow_unused=True)
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, found, strict=True)]
            total = grads if total is None else list(torch._foreach_add(total, grads))
        assert total is not None
        return total


def first_output(output: Any) -> Tensor | None:
    """The first floating-point tensor of what a module returned."""
    return next((x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()), None)
