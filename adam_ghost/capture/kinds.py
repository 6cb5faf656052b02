"""What is known of particular layers: their kind, and where they keep the samples of a batch apart."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
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


def is_plain_lookup(module: nn.Module) -> bool:
    """Whether ``module`` is an embedding whose outputs, and their gradients, are rows of its weight as they are."""
    if layer_kind(module) != "embedding" or not isinstance(module, nn.Embedding):
        return False
    return module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq


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


# forwards of torch.nn whose treatment of a batch is told by ``output_axis``; any other code is followed function by function
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _InstanceNorm)
_SEQUENCES = (nn.MultiheadAttention, nn.RNN, nn.LSTM, nn.GRU)
_OTHERS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_KNOWN = {cls.forward for cls in (*_CONVOLUTIONS, *_NORMS, *_SEQUENCES, *_OTHERS)}
_CONVOLVE = {cls._conv_forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def is_known(module: nn.Module) -> bool:
    """Whether ``output_axis`` tells what the module does to a batch; a subclass with a forward of its own is another one."""
    convolve = getattr(type(module), "_conv_forward", None)
    return not has_own_forward(module) and type(module).forward in _KNOWN and (convolve is None or convolve in _CONVOLVE)


def batch_axis(module: nn.Module, axis: int) -> int:
    """Where a layer that mixes positions expects the batch; any axis will do for the others."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return 0 if module.batch_first else 1
    return axis


def output_axis(module: nn.Module, index: int, tensors: Sequence[Tensor], axes: Mapping[int, int]) -> int | None:
    """Where output ``index`` of a known module has the batch; None if it mixes what lies along it.

    ``tensors`` are the module's arguments, ``axes`` the dimension of the batch in those that carry it, by their index.
    """
    if isinstance(module, nn.RNNBase):
        expected = {0: batch_axis(module, 0)} | dict.fromkeys(range(1, len(tensors)), 1)  # states are [layers, n, d]
        apart = tensors[0].ndim == 3 and all(axis == expected[i] for i, axis in axes.items())
        return (1 if index else expected[0]) if apart else None
    if isinstance(module, nn.MultiheadAttention):
        axis = batch_axis(module, 0)
        # masks come after query, key and value, and count samples first
        apart = all(at == (axis if i < 3 else 0) and (i >= 3 or tensors[i].ndim == 3) for i, at in axes.items())
        return (0 if index else axis) if apart else None  # the attention weights are [n, T, T]
    if len(set(axes.values())) != 1 or not (0 in axes or isinstance(module, nn.Bilinear)):
        return None
    axis, x = next(iter(axes.values())), tensors[0]
    return (
        axis if _keeps_apart(module, x, axis) and (len(axes) == 1 or isinstance(module, (nn.Bilinear, nn.EmbeddingBag))) else None
    )


def token_axis(module: nn.Module, index: int, tensors: Sequence[Tensor], i: int, axis: int) -> int | None:
    """Where output ``index`` of a known module has the tokens of packed rows that argument ``i`` has along dimension ``axis``.

    None if they are mixed; attention's are its queries', and what runs along a sequence has one result to each.
    """
    if isinstance(module, nn.RNNBase):
        return axis if i == index == 0 else None
    if isinstance(module, nn.MultiheadAttention):
        return (1 if index else axis) if i == 0 else None  # the attention weights are [n, T, T]
    return output_axis(module, index, tensors, {i: axis})


def _keeps_apart(module: nn.Module, x: Tensor, axis: int) -> bool:
    if isinstance(module, _ConvNd):
        return axis == 0 and x.ndim == module.weight.ndim  # with one less, the first are channels
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return axis < x.ndim - len(module.normalized_shape)
    if isinstance(module, _InstanceNorm):
        return axis == 0 and x.ndim > module._get_no_batch_dim()
    if isinstance(module, nn.GroupNorm):
        return axis == 0
    if isinstance(module, nn.EmbeddingBag):
        return axis == 0 and x.ndim == 2  # with one, the bags are told by offsets
    if isinstance(module, (nn.Embedding, _BatchNorm)):
        return True
    return axis < x.ndim - 1
