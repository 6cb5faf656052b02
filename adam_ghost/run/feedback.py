"""The feedback ``H lambda``: how an earlier change of the weights acts through the gradients of a later step.

``H`` is the Hessian of a step's training loss where its weights were (docs/method.md, 6). Each way takes the kept batches of the
step, their gradient there, and a vector per parameter, and returns the product, per parameter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

from adam_ghost.run.rerun import KeptBatch, Rerun

# of the weights' norm, the step of a difference: below it float32 rounds the difference away, or bfloat16 does (measured)
_REACH, _REACH_HALF = 1e-3, 3e-2
# of a batch's rows, those that the Gauss-Newton product is taken on
_SHARE = 0.25

Feedback = Callable[[Rerun, Sequence[KeptBatch], list[Tensor], list[Tensor]], list[Tensor]]


@contextmanager
def _moved(rerun: Rerun, batches: Sequence[KeptBatch], vector: list[Tensor]) -> Iterator[Tensor]:
    """The weights a small step along ``vector``; yields the step, ``[]``, 0 where the vector is."""
    data = [p.data for p in rerun.params]
    reach = _REACH if all(batch.autocast is None for batch in batches) else _REACH_HALF
    length = norm(vector)
    c = torch.where(length > 0, reach * norm(data) / length, 0.0)
    before = [x.clone() for x in data]
    torch._foreach_add_(data, [v * c.to(v.dtype) for v in vector])
    try:
        yield c
    finally:
        torch._foreach_copy_(data, before)


def differences(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """``(g(w + c vector) - g(w)) / c``: one more gradient, of any code, compiled or not; error of 1e-3 in float32."""
    with _moved(rerun, batches, vector) as c:
        there = rerun.gradient(batches)
    return [torch.where(c > 0, (x - g) / c.to(x.dtype), 0.0) for x, g in zip(there, grads, strict=True)]


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


def forward(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """The derivative of the gradient along ``vector``: exact, for code with forward-mode derivatives."""
    total = [torch.zeros_like(p) for p in rerun.params]
    for batch in batches:

        def loss(held: dict[str, Tensor], batch: KeptBatch = batch) -> Tensor:
            with _reparametrize_module(rerun.model, held, tie_weights=True):
                return rerun.loss(batch)

        with sdpa_kernel(SDPBackend.MATH):  # the one attention with a forward mode
            held = {k: p.detach() for k, p in zip(rerun.names, rerun.params, strict=True)}
            along = dict(zip(rerun.names, vector, strict=True))
            # forward over reverse: the other order is silently wrong through layer_norm (PyTorch 2.13)
            found = torch.func.jvp(torch.func.grad(loss), (held,), (along,))[1]
        for x, h in zip(total, found.values(), strict=True):
            x += h
    return total


def gauss_newton(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """``J^T H_out J vector`` on a quarter of each batch: the loss' curvature in the model's output alone, never negative.

    Unlike the Hessian it bears a part of the batch: a sixth of the price of a gradient of all, and a worse score.
    """
    total = [torch.zeros_like(p) for p in rerun.params]
    for batch in batches:
        rows = rerun.some_rows(batch, _SHARE)
        loss, out = rerun.loss_and_output(batch, rows)
        (slope,) = torch.autograd.grad(loss, out, create_graph=True)  # [rows, ...]
        with _moved(rerun, [batch], vector) as c, torch.no_grad():
            _, there = rerun.loss_and_output(batch, rows)
        change = torch.where(c > 0, (there - out.detach()) / c.to(out.dtype), 0.0)
        (bent,) = torch.autograd.grad(slope, out, change, allow_unused=True)
        if bent is None:  # a loss that is linear in the output bends nowhere
            continue
        # the rows' share in the batch's own loss, whatever that averages over; and the others'
        scale = batch.first_row / slope.detach()[0].norm() * (len(batch.ids) / len(rows))
        found = torch.autograd.grad(out, rerun.params, bent * scale.to(bent.dtype), allow_unused=True)
        for x, h in zip(total, found, strict=True):
            if h is not None:
                x += h
    return total


def none(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
    """No feedback: what a sample does through momentum alone."""
    return [torch.zeros_like(p) for p in rerun.params]


FEEDBACKS: dict[str, Feedback] = {
    "differences": differences,
    "double": double,
    "forward": forward,
    "gauss-newton": gauss_newton,
    "none": none,
}


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """``[]``, float64: of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float64)))
