"""The thin layer's recorder: a `with` block around one step's forward and backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adam_ghost.capture.learned import LearningRecorder
from adam_ghost.capture.recording import Recording
from adam_ghost.optim import Optimizers, OptState, read_optimizer
from adam_ghost.step.coverage import Coverage, refuse_mixed_samples
from adam_ghost.step.fingerprint import EDITED, Fingerprint
from adam_ghost.step.step import Step, gather_step
from adam_ghost.step.supported import refuse_unsupported
from adam_ghost.step.validation import Validation


class LayerCache:
    """Records each layer call's input and output gradient inside ``with cache:``, for ``attribute``, ``gram`` and the like.

    A layer is a module that owns trainable parameters and has no submodules (``nn.MultiheadAttention`` and parametrized
    modules count as one); parameters used by torch functions outside such modules are recorded per function. Entered again, it
    forgets what it held. Nothing of it stays on the model after the block, and outputs, gradients and random state are those of
    the bare model.

    Args:
        model: the module whose forward pass runs inside the block, called with the batch along dimension 0: every tensor among
            its arguments whose first dimension is as long as the first one's is taken for samples, a table of that many rows
            too: make such a table a buffer of the model.
        val_loss: called without arguments whenever the validation gradient is needed; returns the loss to attribute, a
            scalar or ``[K]`` for ``K`` targets, with a graph. It runs the model itself, in any mode it likes.
        strict: raise instead of warning where a parameter's gradient cannot be attributed.

    Raises:
        TypeError: the model is spread over processes or devices, or has complex parameters.
        ValueError: on entering, if a BatchNorm is in training mode (it mixes the samples), or if a block is nested; inside, if
            the batch is not dimension 0.
    """

    def __init__(self, model: nn.Module, val_loss: Callable[[], Tensor] | None = None, *, strict: bool = False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if val_loss is not None and not callable(val_loss):
            raise TypeError(f"val_loss must be callable and return the validation loss, got {type(val_loss).__name__}")
        refuse_unsupported(model)
        self.model = model
        self.coverage = Coverage(strict)
        self.validation = Validation(val_loss, model)
        self._recorder = LearningRecorder(model)
        self._recording = False
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recorded = Recording()
        self._fingerprint: Fingerprint | None = None
        self._versions: list[tuple[nn.Parameter, int]] = []

    def __enter__(self) -> "LayerCache":
        if self._recording:
            raise ValueError("this LayerCache is recording already: `with cache` cannot be nested")
        refuse_mixed_samples(self.model)
        self.clear()
        self._recorder.attach()
        self._recorder.begin(self.recorded)
        self._recording = True
        return self

    def __exit__(self, *exc: object) -> None:
        self._recorder.detach()
        self._recorder.recording = None
        self._recording = False
        if exc[0] is not None:
            self.clear()
            return
        grads = self._grads()
        if grads:
            self._fingerprint = Fingerprint.of(grads)
        self.mark_weights()

    def mark_weights(self) -> None:
        """The weights are those that the recorded gradients belong to."""
        self._versions = [(p, p._version) for p in self.model.parameters()]

    def same_weights(self) -> bool:
        return all(p._version == version for p, version in self._versions)

    def _grads(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None and p.grad.layout is torch.strided}

    def scaled_since(self) -> dict[str, Tensor]:
        """What the gradients were multiplied by since the block ended (clipped, unscaled); empty if by nothing.

        Raises ValueError if they were changed in any other way.
        """
        grads = self._grads()
        if self._fingerprint is None or self._fingerprint.untouched(grads):
            return {}
        changes = self._fingerprint.changes(grads)
        if changes.edited.device.type == "cpu" and bool(changes.edited.any()):
            raise ValueError(EDITED)
        return changes.scale

    @property
    def recording(self) -> bool:
        return self._recording


def open_step(cache: LayerCache, opt_state: Optimizers | OptState) -> Step:
    """The step that ``cache`` recorded, checked before anything is computed or changed. Errors as in ``attribute``."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"layer_cache must be an adam_ghost.LayerCache, got {type(cache).__name__}")
    opt_state = read_optimizer(opt_state)
    if cache.recording:
        raise ValueError("the scores are computed after the `with cache` block, not inside it")
    if cache.recorded.deviation:
        raise ValueError(cache.recorded.deviation)
    if not cache.recorded.calls:
        raise ValueError("nothing was recorded: run the model's forward and backward pass inside `with cache`")
    if not cache.same_weights():
        raise ValueError("the weights changed since `with cache`: compute the scores before optimizer.step()")
    for name, p in cache.model.named_parameters():
        # looking costs no synchronisation on the CPU; on a GPU the scores come out as not finite
        g = p.grad
        if g is not None and g.device.type == "cpu" and g.layout is torch.strided and not bool(g.isfinite().all()):
            raise ValueError(f"the gradient of '{name}' is not finite")
    step = gather_step(cache.model, opt_state, [cache.recorded], cache.coverage)
    step.scale = cache.scaled_since()
    return step
