"""The thin layer's recorder: a `with` block around one step's forward and backward pass."""

import warnings
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adam_ghost.capture import Recorder, Recording
from adam_ghost.validation import Validation


class LayerCache:
    """Records each layer call's input and output gradient inside ``with cache:``, for ``attribute``, ``gram`` and the like.

    A layer is a module that owns trainable parameters and has no submodules (``nn.MultiheadAttention`` and parametrized
    modules count as one); parameters used by torch functions outside such modules are recorded per function. Nothing of it
    stays on the model after the block, and outputs, gradients and random state are those of the bare model.

    Args:
        model: the module whose forward pass runs inside the block, called with the batch along dimension 0.
        val_loss: called without arguments whenever the validation gradient is needed; returns the loss to attribute, a
            scalar or ``[K]`` for ``K`` targets, with a graph. It runs the model itself, in any mode it likes.
        strict: raise instead of warning where a parameter's gradient cannot be attributed.

    Raises:
        ValueError: on entering, if a BatchNorm is in training mode (it mixes the samples), or if a block is nested or
            repeated before its calls were used or cleared; inside, if the batch is not dimension 0.
    """

    def __init__(self, model: nn.Module, val_loss: Callable[[], Tensor] | None = None, *, strict: bool = False):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if val_loss is not None and not callable(val_loss):
            raise TypeError(f"val_loss must be callable and return the validation loss, got {type(val_loss).__name__}")
        self.model = model
        self.coverage = Coverage(strict)
        self.validation = Validation(val_loss, model)
        self._recorder: Recorder | None = None
        self.clear()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recorded = Recording()
        self.used = False

    def __enter__(self) -> "LayerCache":
        if self._recorder is not None:
            raise ValueError("this LayerCache is recording already: `with cache` cannot be nested")
        if self.recorded.calls and not self.used:
            raise ValueError("`with cache` was entered again before its recording was used: call attribute, or cache.clear()")
        refuse_mixed_samples(self.model)
        self.clear()
        self._recorder = Recorder(self.model)
        self._recorder.attach()
        self._recorder.begin(self.recorded)
        return self

    def __exit__(self, *exc) -> None:
        recorder, self._recorder = self._recorder, None
        recorder.end()
        recorder.detach()
        if exc[0] is not None:
            self.clear()

    @property
    def recording(self) -> bool:
        return self._recorder is not None


class Coverage:
    """What share of the gradient the scores explain; names the parameters left out, once."""

    def __init__(self, strict: bool):
        self.strict, self.share = strict, 1.0
        self._warned = False

    def report(self, missing: list[str], share: float) -> None:
        """Takes the names of parameters whose gradient no recorded call explains; raises RuntimeError under ``strict``."""
        self.share = share
        if not missing:
            return
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        message = f"not attributed: {shown}; the scores cover {share:.1%} of the parameters that got a gradient"
        if self.strict:
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, UserWarning, stacklevel=5)


def refuse_mixed_samples(model: nn.Module) -> None:
    """Raises ValueError, by name, if a layer in its present mode mixes the samples of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"'{name}' is a {type(module).__name__} in training mode: it mixes the samples of a batch; put it in eval()"
            )
