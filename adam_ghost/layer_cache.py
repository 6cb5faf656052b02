"""The thin layer's recorder: a `with` block around one step's forward and backward pass."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adam_ghost.capture import Recorder, Recording
from adam_ghost.fingerprint import Fingerprint
from adam_ghost.validation import Validation

# of the scores' size: beyond it the scores do not add up to < P , g(B) >, and something is missing or scaled wrongly
SELF_CHECK = 0.02


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
        self._fingerprint: Fingerprint | None = None
        self._with_gradient: list[nn.Parameter] = []
        self._versions: list[tuple[nn.Parameter, int]] = []

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
            return
        self._with_gradient = [p for p in self.model.parameters() if p.grad is not None and p.grad.layout is torch.strided]
        if self._with_gradient:
            self._fingerprint = Fingerprint.of([p.grad for p in self._with_gradient])
        self.mark_weights()

    def mark_weights(self) -> None:
        """The weights are those that the recorded gradients belong to."""
        self._versions = [(p, p._version) for p in self.model.parameters()]

    def same_weights(self) -> bool:
        return all(p._version == version for p, version in self._versions)

    def scaled_since(self) -> dict[int, Tensor] | None:
        """By parameter id, what the gradients were multiplied by since the block ended (clipped, unscaled); None if by nothing.

        Raises ValueError if they were changed in any other way.
        """
        if self._fingerprint is None or self._fingerprint.untouched([p.grad for p in self._with_gradient]):
            return None
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        edited = len(grads) != len(self._with_gradient)
        if not edited:
            scale, edits = self._fingerprint.scale_to(Fingerprint.of(grads))
            edited = grads[0].device.type == "cpu" and bool(edits.any())
        if edited:
            raise ValueError(
                "gradients were changed since the `with cache` block by more than one factor each (clipped by value, masked, added"
                " to): scores of the step's gradient cannot be had from the recorded calls"
            )
        return dict(zip(map(id, self._with_gradient), scale.unbind(), strict=True))

    @property
    def recording(self) -> bool:
        return self._recorder is not None


class Coverage:
    """What share of the gradient the scores explain; names the parameters left out, once."""

    def __init__(self, strict: bool):
        self.strict, self.share = strict, 1.0
        self._warned = False

    def check(self, scores: Tensor, total: Tensor) -> None:
        """Whether scores ``[..., K]`` add up to the step's ``total [K]``, where parameters left out do not explain it; off the GPU,
        where looking costs no synchronisation. Warns once, raises RuntimeError under ``strict``."""
        if self.share < 1 or (self._warned and not self.strict) or scores.device.type != "cpu":
            return
        scores = scores.flatten(0, -2)
        size = torch.maximum(total.abs(), scores.norm(dim=0))
        if bool(((scores.sum(0) - total).abs() > SELF_CHECK * size).any()):
            self._tell(
                f"the scores add up to {scores.sum(0).tolist()}, but the step's gradient to {total.tolist()}: part of the gradient"
                " did not come from the recorded samples (a penalty on the weights, a hook on gradients, gradients from before)"
            )

    def report(self, missing: list[str], share: float) -> None:
        """Takes the names of parameters whose gradient no recorded call explains; raises RuntimeError under ``strict``."""
        self.share = share
        if not missing:
            return
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        self._tell(f"not attributed: {shown}; the scores cover {share:.1%} of the parameters that got a gradient")

    def _tell(self, message: str) -> None:
        if self.strict:
            raise RuntimeError(message)
        if not self._warned:
            self._warned = True
            warnings.warn(message, UserWarning, stacklevel=6)


def refuse_mixed_samples(model: nn.Module) -> None:
    """Raises ValueError, by name, if a layer in its present mode mixes the samples of a batch."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            why = "in training mode" if module.training else "without running statistics"
            cure = "put it in eval()" if module.training else "use track_running_stats=True, or another norm"
            raise ValueError(f"'{name}' is a {type(module).__name__} {why}: it mixes the samples of a batch; {cure}")
