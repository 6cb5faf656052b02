"""The feedback ``H lambda``: how an earlier change of the weights acts through the gradients of a later step.

``H`` is the Hessian of a step's training loss where its weights were (docs/method.md, 6). Each way takes the kept batches of the
step, their gradient there, and a vector per parameter, and returns the product, per parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.stateless import _reparametrize_module

from adam_ghost.run.rerun import EVERY, KeptBatch, Rerun, slopes
from adam_ghost.run.small_step import SmallSteps, norm

Feedback = Callable[[Rerun, Sequence[KeptBatch], list[Tensor], list[Tensor], SmallSteps], list[Tensor]]


def differences(
    rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], steps: SmallSteps
) -> list[Tensor]:
    """``(g(w + c vector) - g(w)) / c``: one more gradient, of any smooth code, compiled or not; error of 1e-3 in float32."""
    rerun.find_scales(batches)

    def look() -> list[Tensor]:
        there = rerun.gradient(batches)
        torch._foreach_sub_(there, grads)
        return there

    return steps.difference(batches, vector, norm(grads), look)


def double(
    rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], steps: SmallSteps
) -> list[Tensor]:
    """The gradient of ``< g(w) , vector >``: exact, for code whose backward pass can be differentiated, at twice the price."""
    scales = rerun.find_scales(batches)
    total = [torch.zeros_like(p) for p in rerun.params]
    for batch, scale in zip(batches, scales, strict=True):
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the one attention with a second derivative
            first = torch.autograd.grad(rerun.loss(batch), rerun.params, create_graph=True, allow_unused=True)
            pairs = [(g, v.to(g.dtype)) for g, v in zip(first, vector, strict=True) if g is not None and g.requires_grad]
            if pairs:
                bent, along = zip(*pairs, strict=True)
                _add(total, torch.autograd.grad(bent, rerun.params, along, allow_unused=True), scale)
    rerun.world.mean(total)
    return total


def forward(
    rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], steps: SmallSteps
) -> list[Tensor]:
    """The derivative of the gradient along ``vector``: exact, for code with forward-mode derivatives."""
    scales = rerun.find_scales(batches)
    total = [torch.zeros_like(p) for p in rerun.params]
    held = {name: p.detach() for name, p in zip(rerun.names, rerun.params, strict=True)}
    along = dict(zip(rerun.names, vector, strict=True))
    for batch, scale in zip(batches, scales, strict=True):

        def loss(held: dict[str, Tensor], batch: KeptBatch = batch) -> Tensor:
            # buffers that the model writes to have to belong to the transform
            buffers = {name: b.clone() for name, b in rerun.model.named_buffers()}
            with _reparametrize_module(rerun.model, held | buffers, tie_weights=True), torch.enable_grad():
                return rerun.loss(batch)

        with sdpa_kernel(SDPBackend.MATH):  # the one attention with a forward mode
            # forward over reverse: the other order is silently wrong through layer_norm (PyTorch 2.13)
            found = torch.func.jvp(torch.func.grad(loss), (held,), (along,))[1]
        _add(total, list(found.values()), scale)
    rerun.world.mean(total)
    return total


def gauss_newton(
    rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], steps: SmallSteps
) -> list[Tensor]:
    """``J^T H_out J vector`` on every fourth row: the loss' curvature in the model's output alone, never negative.

    Unlike the Hessian it bears a part of the batch: for a third of the price of a step.
    """
    total = rerun.zeros()
    for batch in batches:
        batch.only_output("feedback='gauss-newton'")
        n = len(batch.ids)
        rows = torch.arange(0, n, EVERY, device=rerun.device) if batch.packing is None else None
        with torch.enable_grad():
            loss, out = rerun.loss_and_output(batch, rows)
            if out.ndim < 2 or (rows is not None and len(out) != len(rows)):
                raise ValueError(
                    "feedback='gauss-newton' needs a model whose output has the batch as its first dimension, got shape"
                    f" {list(out.shape)} for {n} samples; use feedback='differences'"
                )
            (slope,) = torch.autograd.grad(loss, out, create_graph=True)  # [rows, ...]
        here = out.detach()

        def look(batch: KeptBatch = batch, rows: Tensor | None = rows, here: Tensor = here) -> list[Tensor]:
            with torch.no_grad():
                return [rerun.loss_and_output(batch, rows)[1] - here]

        (change,) = steps.difference([batch], vector, norm([here]), look, rows=True)  # J vector
        ends, along = [out], [torch.zeros_like(out)]  # a loss that is linear in the output bends nowhere
        if slope.requires_grad:
            ends, along = [*ends, slope], [*along, change]
        # the same passes whatever the loss: each may gather weights, which all processes have to do
        (bent,) = torch.autograd.grad(ends, out, along, retain_graph=True)
        # the rows' share in the loss of all, whatever that averages over; and the rows that stand for the others
        seen = slopes(slope)
        then = (batch.slopes if rows is None else batch.slopes[rows]).to(seen)
        scale = torch.where(seen.norm() > 0, then.norm() / seen.norm(), 0.0)
        scale = scale if rows is None else scale * n / max(1, len(rows))
        rerun.add_gradient(total, out, bent * scale.to(bent.dtype))
    rerun.average(total)
    return total


def _add(total: list[Tensor], found: Sequence[Tensor | None], scale: Tensor) -> None:
    for x, h in zip(total, found, strict=True):
        if h is not None:
            x += h * scale.to(h.dtype)


def none(rerun: Rerun, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], steps: SmallSteps) -> list[Tensor]:
    """No feedback: what a sample does through momentum alone."""
    return [torch.zeros_like(x) for x in vector]


FEEDBACKS: dict[str, Feedback] = {
    "differences": differences,
    "double": double,
    "forward": forward,
    "gauss-newton": gauss_newton,
    "none": none,
}


# those that know of the model's gradient only what a backward pass leaves in .grad
OF_PARTS = ("auto", "differences", "gauss-newton", "none")
