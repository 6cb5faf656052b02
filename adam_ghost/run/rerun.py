"""A kept batch run again: the same inputs, random numbers and precision, at whatever weights the model holds now."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adam_ghost.capture.calls import RngState, rng_state
from adam_ghost.capture.rows import Packing
from adam_ghost.processes.world import World
from adam_ghost.step.validation import gradients_aside

CALLED_ONCE = "schedule='window' needs a model that train_loss calls once, and that returns the same tensors again"

# of a batch's rows, those that Gauss-Newton products are taken on
EVERY = 4
# factors this near to 1 are rounding
_ROUNDING = 1e-4


@dataclass
class KeptBatch:
    """What it takes to run a micro-batch's forward pass again."""

    ids: Sequence[Hashable]
    inputs: Any
    packing: Packing | None
    announced: RngState  # when the loop named the batch: where train_loss, as a rule, begins
    rng: RngState  # when the model's forward pass began
    autocast: torch.dtype | None  # in that pass
    modes: list[bool]  # of the model's modules: in training or not
    buffers: dict[str, Tensor]  # the model's, as its forward pass found them; batches share what did not change
    used: dict[int, Tensor] = field(default_factory=dict)  # the outputs that the loss uses: [rows], norms of their gradients
    scale: Tensor | None = None  # [], what the loop had multiplied train_loss by before its backward pass

    def __post_init__(self) -> None:
        self._versions = [x._version for x in self._tensors()]

    def _tensors(self) -> list[Tensor]:
        return [x for x in pytree.tree_leaves(self.inputs) if isinstance(x, Tensor) and not x.is_inference()]

    @property
    def output(self) -> int:
        """Which of the model's outputs tells whether the batch runs as it did: the first that the loss uses."""
        return min(self.used)

    @property
    def slopes(self) -> Tensor:
        """``[rows]``, norms of that output's gradients."""
        return self.used[self.output]

    def only_output(self, what: str) -> None:
        """Raises ValueError where the loss uses several outputs."""
        if len(self.used) > 1:
            raise ValueError(f"{what} needs a model of whose outputs the loss uses one, got {len(self.used)}")

    def changed(self) -> bool:
        """Whether the inputs were changed in place since."""
        return [x._version for x in self._tensors()] != self._versions


def slopes(grad: Tensor) -> Tensor:
    """``[rows]``: the norm of the gradient in each row of a model's output."""
    grad = grad.detach()
    if not grad.numel():
        return grad.new_zeros(len(grad))
    return grad.reshape(len(grad), -1).norm(dim=1) if grad.ndim else grad.abs().reshape(1)


def outputs_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of what a module returned that have dimensions; all of them where none has, as a loss."""
    found = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x for x in found if x.ndim] or found


class Rerun:
    """Runs kept batches of ``model`` again by ``train_loss``; nothing of it stays but what the passes compute.

    Batches are this process's; a step's gradient is the mean over the processes of ``world``.
    """

    def __init__(self, model: nn.Module, params: Mapping[str, nn.Parameter], train_loss: Callable[[Any], Tensor], world: World):
        self.model, self.train_loss, self.world = model, train_loss, world
        self.names, self.params = list(params), list(params.values())
        self.device = self.params[0].device
        self._buffers: dict[str, tuple[Tensor, int, Tensor]] = {}  # what was seen last: itself, its version, a copy

    def _keep_buffers(self) -> dict[str, Tensor]:
        for name, x in self.model.named_buffers():
            known = self._buffers.get(name)
            if known is None or known[0] is not x or known[1] != x._version:
                self._buffers[name] = (x, x._version, x.detach().clone())
        return {name: copied for name, (_, _, copied) in self._buffers.items()}

    def keep(self, ids: Sequence[Hashable], inputs: Any, packing: Packing | None, announced: RngState) -> KeptBatch:
        """Called where the batch's forward pass begins."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        modes = [m.training for m in self.model.modules()]
        return KeptBatch(ids, inputs, packing, announced, rng_state(self.device), autocast, modes, self._keep_buffers())

    @property
    def head(self) -> nn.Module:
        """The module whose output is the model's, also where the model's own call returns the loss."""
        embeddings = getattr(self.model, "get_output_embeddings", lambda: None)()
        return self.model if embeddings is None else embeddings

    @contextmanager
    def _as_then(self, batch: KeptBatch) -> Iterator[None]:
        """The modes, precision and random state of the batch's own pass; the last anew where the model's forward begins."""
        modules = list(self.model.modules())
        now = [m.training for m in modules]

        def set_modes(modes: list[bool]) -> None:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

        def draw_from(state: RngState) -> None:
            host, on_device, device = state
            torch.set_rng_state(host)
            if device is not None and on_device is not None:
                torch.cuda.set_rng_state(on_device, device)

        def begin(*_: Any) -> None:
            draw_from(batch.rng)

        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(begin, prepend=True).remove)
            stack.callback(set_modes, now)  # a loop that ends with an evaluation leaves the model in its mode
            set_modes(batch.modes)
            self._put_buffers(batch)
            if batch.autocast is not None:
                stack.enter_context(torch.autocast(self.device.type, batch.autocast))
            draw_from(batch.announced)
            yield

    def _put_buffers(self, batch: KeptBatch) -> None:
        """Gives the model's buffers the values of then; what sweeps puts those of now back."""
        with torch.no_grad():
            for name, x in self.model.named_buffers():
                then, known = batch.buffers.get(name), self._buffers.get(name)
                same = known is not None and known[0] is x and known[1] == x._version and known[2] is then
                if not same and then is not None and then.shape == x.shape:
                    x.copy_(then)

    def loss(self, batch: KeptBatch, inputs: Any = None) -> Tensor:
        """``train_loss`` of the batch, or of other ``inputs`` under its random numbers.

        Raises ValueError where it returns anything but a scalar.
        """
        with self._as_then(batch), self.world.passing():
            loss = self.train_loss(batch.inputs if inputs is None else inputs)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"train_loss must return the scalar that the loop calls backward() on, got {got}")
        return loss

    def loss_and_output(self, batch: KeptBatch, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``train_loss`` of the batch, or of some rows of it, and what the model made of them: ``[rows, ...]``."""
        inputs = batch.inputs
        if rows is not None:
            ours = lambda x: isinstance(x, Tensor) and x.ndim > 0 and len(x) == len(batch.ids)  # noqa: E731
            inputs = pytree.tree_map(lambda x: x[rows.to(x.device)] if ours(x) else x, inputs)
        seen: list[list[Tensor]] = []
        handle = self.head.register_forward_hook(lambda module, args, output: seen.append(outputs_of(output)))
        try:
            loss = self.loss(batch, inputs)
        finally:
            handle.remove()
        if len(seen) != 1 or len(seen[0]) <= batch.output:
            raise ValueError(CALLED_ONCE)
        return loss, seen[0][batch.output]

    def measure_scale(self, batch: KeptBatch, found: Tensor) -> Tensor:
        """Takes, from the output's slopes where the batch ran again at its own weights, what its loss was multiplied by then."""
        size = found.norm()
        scale = torch.where(size > 0, batch.slopes.to(found).norm() / size, 1.0)
        batch.scale = torch.where((scale - 1).abs() < _ROUNDING, 1.0, scale)
        return batch.scale

    def find_scales(self, batches: Sequence[KeptBatch]) -> list[Tensor]:
        """The batches' scales; ``measure_scale`` of those not known yet, by a forward pass at the weights that the model holds."""
        return [self._find_scale(batch) if batch.scale is None else batch.scale for batch in batches]

    def _find_scale(self, batch: KeptBatch) -> Tensor:
        with torch.enable_grad():
            loss, out = self.loss_and_output(batch)
            return self.measure_scale(batch, slopes(torch.autograd.grad(loss, out)[0]))

    def gradient(self, batches: Sequence[KeptBatch]) -> list[Tensor]:
        """The gradient of the batches' losses, as the loop scaled them, by the parameters; zeros where there is none.

        Of parameters that are spread over the processes, this process's part.
        """
        total = self.zeros()
        for batch in batches:
            with torch.enable_grad():
                loss = self.loss(batch)
                loss = loss if batch.scale is None else loss * batch.scale.to(loss.dtype)
            self.add_gradient(total, loss)
        self.average(total)
        return total

    def zeros(self) -> list[Tensor]:
        """Shaped like the parameters, or this process's parts of them."""
        return [torch.zeros_like(x) for x in self.world.parts(p.detach() for p in self.params)]

    def add_gradient(self, total: list[Tensor], out: Tensor, along: Tensor | None = None) -> None:
        """Adds the gradient of ``< out , along >`` by the parameters; sharded ones come averaged."""
        if self.world.sharded:
            with gradients_aside(self.params), self.world.passing():
                out.backward(along)
                found = [p.grad for p in self.params]
        else:
            found = list(torch.autograd.grad(out, self.params, along, allow_unused=True))
        pairs = [(x, g) for x, g in zip(total, found, strict=True) if g is not None]
        for (x, _), g in zip(pairs, self.world.parts(g for _, g in pairs), strict=True):
            x += g

    def average(self, total: list[Tensor]) -> None:
        """Makes of the sum of added gradients what it is in the mean over the processes."""
        if not self.world.sharded:
            self.world.mean(total)
