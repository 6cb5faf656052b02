"""The feedback ``H lambda``: how an earlier change of the weights acts through the gradients of a later step.

``H`` is the Hessian of a step's training loss where its weights were (docs/method.md, 6). Each way takes the kept batches of the
step, their gradient there, and a vector per parameter, and returns the product, per parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adam_ghost.run.rerun import KeptBatch, Rerun

# of the weights' norm, the step of a difference of gradients: below it float32 rounds the difference away (measured)
_REACH = 1e-3

Feedback = Callable[[Rerun, Sequence[KeptBatch], list[Tensor], list[Tensor]], list[Tensor]]


def differences(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """``(g(w + c vector) - g(w)) / c``: one more gradient, of any code, compiled or not; error of 1e-3 in float32."""
    data = [p.data for p in rerun.params]
    length, size = _norm(vector), _norm(data)
    c = torch.where(length > 0, _REACH * size / length, 0.0)
    before = [x.clone() for x in data]
    torch._foreach_add_(data, [v * c for v in vector])
    try:
        there = rerun.gradient(batches)
    finally:
        torch._foreach_copy_(data, before)
    return [torch.where(c > 0, (x - g) / c, 0.0) for x, g in zip(there, grads, strict=True)]


def double(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """The gradient of ``< g(w) , vector >``: exact, for code whose backward pass can be differentiated, at twice the price."""
    total = [torch.zeros_like(p) for p in rerun.params]
    for batch in batches:
        with sdpa_kernel(SDPBackend.MATH):  # the one attention with a second derivative
            loss = rerun.loss(batch)
            first = torch.autograd.grad(loss, rerun.params, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(first, vector, strict=True) if g is not None and g.requires_grad]
            if not pairs:
                continue
            found = torch.autograd.grad([g for g, _ in pairs], rerun.params, [v.to(g.dtype) for g, v in pairs], allow_unused=True)
        for x, h in zip(total, found, strict=True):
            if h is not None:
                x += h
    return total


def none(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """No feedback: what a sample does through momentum alone."""
    return [torch.zeros_like(p) for p in rerun.params]


FEEDBACKS: dict[str, Feedback] = {"differences": differences, "double": double, "none": none}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)))
