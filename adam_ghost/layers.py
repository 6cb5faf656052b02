"""What is known of particular layers: which forms of the contraction are exact for them."""

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

_LINEAR_IN_PARAMETERS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Bilinear, nn.EmbeddingBag)


def layer_kind(fn: object) -> str | None:
    """The form that attribution takes for ``fn``, a module or function.

    ``linear``: ``a @ W.T + bias``; ``conv1d``: Hugging Face's ``Conv1D``, the same with ``W`` transposed; ``embedding``: rows
    of ``W``; ``affine``: linear in its parameters, so that running it with ``P`` in their place is exact; None: anything
    else, by its Jacobian. A subclass with a forward of its own is another layer.
    """
    if not isinstance(fn, nn.Module) or is_parametrized(fn):
        return None
    forward = type(fn).forward
    if forward is nn.Linear.forward:
        return "linear"
    if forward.__module__ == "transformers.pytorch_utils" and type(fn).__name__ == "Conv1D":
        return "conv1d"
    if forward is nn.Embedding.forward:
        return "embedding"
    if isinstance(fn, _ConvNd) and forward.__module__ == nn.Conv1d.__module__:
        return "affine"
    if any(forward is kind.forward for kind in _LINEAR_IN_PARAMETERS):
        plain_bag = not isinstance(fn, nn.EmbeddingBag) or (fn.mode != "max" and fn.max_norm is None and not fn.scale_grad_by_freq)
        return "affine" if plain_bag else None
    return None
