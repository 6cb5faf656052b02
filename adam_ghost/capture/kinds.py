"""What is known of particular layers: their kind, and where they keep the samples of a batch apart."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized

from adam_ghost.capture.hooks import has_own_forward

_KINDS: dict[str, Callable[[nn.Module], bool]] = {}


def register_kind(kind: str, matches: Callable[[nn.Module], bool]) -> None:
    """Calls the modules for which ``matches`` holds layers of ``kind``; later registrations are asked first."""
    _KINDS[kind] = matches


def layer_kind(fn: object) -> str | None:
    """The kind of ``fn``, a module or function, by which its form of the scores is found; None: any other code.

    A subclass, or an instance, with a forward of its own is another layer, and so is one whose weights are parametrized.
    """
    if not isinstance(fn, nn.Module) or is_parametrized(fn) or has_own_forward(fn):
        return None
    return next((kind for kind, matches in reversed(_KINDS.items()) if matches(fn)), None)


def _forward_of(module: nn.Module) -> Callable | None:
    """The forward that the class of ``module`` defines; None for a scripted module, whose class has none."""
    return getattr(type(module), "forward", None)


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer holds its weight as ``[d_in, d_out]``, as Hugging Face's ``Conv1D`` does."""
    return type(layer).__name__ == "Conv1D" and _forward_of(layer).__module__ == "transformers.pytorch_utils"


def _is_linear(module: nn.Module) -> bool:
    return _forward_of(module) is nn.Linear.forward or is_transposed(module)


def _is_affine(module: nn.Module) -> bool:
    forward = _forward_of(module)
    if isinstance(module, nn.EmbeddingBag):
        plain = module.mode != "max" and module.max_norm is None and not module.scale_grad_by_freq
        return forward is nn.EmbeddingBag.forward and plain
    if isinstance(module, _ConvNd):
        return forward.__module__ == nn.Conv1d.__module__
    return forward in (nn.GroupNorm.forward, nn.Bilinear.forward)


register_kind("linear", _is_linear)  # a @ W.T + bias
register_kind("embedding", lambda module: _forward_of(module) is nn.Embedding.forward)  # rows of W
register_kind("norm", lambda module: _forward_of(module) in (nn.LayerNorm.forward, nn.RMSNorm.forward))
register_kind("affine", _is_affine)  # linear in its parameters: run with P in their place, it is its own derivative


def keeps_apart(module: nn.Module, x: Tensor, axis: int) -> bool:
    """Whether ``module`` never mixes what lies along dimension ``axis`` of its input ``x``; as far as it is known here."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return x.ndim == 3  # with two, the first are tokens
    if isinstance(module, _ConvNd):
        return axis == 0 and x.ndim == module.weight.ndim  # with one less, the first are channels
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return axis < x.ndim - len(module.normalized_shape)
    if isinstance(module, (nn.GroupNorm, _InstanceNorm)):
        return axis == 0
    return not isinstance(module, (nn.Linear, nn.Bilinear)) or axis < x.ndim - 1


def batch_axis(module: nn.Module, axis: int) -> int:
    """Where a layer that mixes positions expects the batch; any axis will do for the others."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return 0 if module.batch_first else 1
    return axis


def output_axes(module: nn.Module, index: int, axis: int) -> tuple[int, ...]:
    """Where output ``index`` may have the batch that came in along ``axis``, likeliest first."""
    if isinstance(module, nn.RNNBase) and index > 0:
        return (1,)  # the final states, [layers, n, d]
    if isinstance(module, nn.MultiheadAttention) and index > 0:
        return (0,)  # the attention weights, [n, T, T]
    return (axis,) if type(module).__module__.startswith("torch.nn.") else (axis, 0, 1)
