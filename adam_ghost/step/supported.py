"""Models whose scores would be wrong without a word, refused by name before anything is changed."""

from torch import nn


def refuse_unsupported(model: nn.Module) -> None:
    """Raises TypeError, by name, for complex parameters."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_complex():
            raise TypeError(f"'{name}' is complex ({p.dtype}), which is not supported: keep its real and imaginary parts apart")
