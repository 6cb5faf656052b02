"""What an optimizer's running means say of gradients."""

from torch import Tensor, maximum


def raised(mean_square: Tensor, square: Tensor, share: Tensor, new: float | Tensor, kept: float | Tensor) -> Tensor:
    """``mean_square`` so that ``kept`` times it and ``new`` times the gradient's ``square`` are at least ``new * share**2``."""
    if not isinstance(kept, Tensor) and not kept:
        return mean_square
    return maximum(mean_square, ((share * share - square) * (new / kept)).to(mean_square.dtype))


def typical_gradient(mean: Tensor | None, mean_square: Tensor) -> Tensor:
    """The gradient that running means of it and of its square let expect, in memory of its own.

    It has the mean's sign (positive without one) and the root mean square's size (the mean alone is too small, and a secant
    depends on the size), but at least a tenth of the parameter's typical size: rows of an embedding whose token has hardly been
    seen would otherwise expect nothing, and take any gradient for an enormous step.
    """
    size = mean_square.sqrt().clamp_(min=0.1 * mean_square.mean().sqrt())
    return size if mean is None else size.copysign_(mean)
