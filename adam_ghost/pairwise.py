"""Pairwise products of the samples' gradients under Adam's preconditioner: who pulls with whom in this step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from adam_ghost.capture.calls import Call
from adam_ghost.capture.kinds import is_transposed, layer_kind
from adam_ghost.capture.rows import Rows
from adam_ghost.layer_cache import LayerCache, check_cache, open_step
from adam_ghost.optim import Optimizers, OptState
from adam_ghost.scores import ops
from adam_ghost.scores.forms import Asked
from adam_ghost.scores.shapes import add, in_line, samples_first, samples_of
from adam_ghost.step.step import Step, plain_precision


def gram(layer_cache: LayerCache, opt_state: Optimizers | OptState, *, preconditioner: str | None = "exact") -> Tensor:
    """``< D * g_i , g_j >`` for all pairs of the recorded batch, ``[n, n]``, at least float32.

    With Adam's preconditioner ``D = lr * S`` (secant) entry ``[i, j]`` is, to first order, how much sample ``i``'s share of
    the step lowers sample ``j``'s share of the training loss. Needs no validation loss; weights and recording stay.

    Args:
        layer_cache: what ``with layer_cache:`` recorded, with the final ``.grad`` in place.
        opt_state: the optimizer about to step, or its state.
        preconditioner: ``exact`` (elementwise, from blocks of per-sample gradient rows, at most 64 MB at once), ``factored``
            (linear layers by the best rank-one ``D = r c^T`` and ghost Grams, no per-sample gradient; others exact), or
            None (``D = 1``: the plain Gram matrix, without lr).

    Raises:
        ValueError: unknown ``preconditioner``; and as ``attribute``.
    """
    if preconditioner not in ("exact", "factored", None):
        raise ValueError(f"preconditioner must be 'exact', 'factored' or None, got {preconditioner!r}")
    check_cache(layer_cache)
    if layer_cache.validation.world.sharded:
        raise ValueError("gram needs whole parameters, and fully_shard shards this model's")
    step = open_step(layer_cache, opt_state)
    with plain_precision(layer_cache.model):
        return add(_products(step, preconditioner))


def _products(step: Step, preconditioner: str | None) -> Iterator[Tensor]:
    """Parts ``[n, n]`` that add up to the products of all pairs."""
    (recorded,) = step.recordings
    asked = Asked(recorded.batch_size, recorded.packing)
    for name, p in step.params.items():
        D = None if preconditioner is None else step.opt_state.metric(p, step.grads[name])
        calls = [call for call in recorded.calls if name in call.parameters()]
        linear = calls and name not in step.whole and p.ndim == 2 and all(layer_kind(c.fn) == "linear" for c in calls)
        if linear and D is not None and preconditioner == "factored":
            scale = (step.scale[name] if step.scale else 1.0) * step.world.share
            yield from _factored(calls, D * scale**2, asked)
        else:
            yield from _exact(step, name, D)


def _exact(step: Step, name: str, D: Tensor | None) -> Iterator[Tensor]:
    for block, G in step.sample_gradient_blocks(name):
        flat = G.flatten(1) if G.ndim > 1 else G[:, None]
        scaled = flat if D is None else flat * D[block].reshape(-1)
        yield scaled @ flat.mT


def _factored(calls: list[Call], D: Tensor, asked: Asked) -> Iterator[Tensor]:
    row, col = _rank_one(D)
    if is_transposed(calls[0].fn):
        row, col = col, row
    sides = [_side(c, asked, D.dtype) for c in calls]
    for i, (a, b, offsets) in enumerate(sides):
        yield ops.ghost_gram(a, b, row=row, col=col, offsets=offsets)
        for a2, b2, offsets2 in sides[:i]:
            across = ops.ghost_gram(a, b, a2, b2, row=row, col=col, offsets=offsets, offsets2=offsets2)
            yield from (across, across.mT)


def _side(call: Call, asked: Asked, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """A call's inputs and output gradients, ``[n, T, d]``, or ``[N, d]`` with the samples' offsets."""
    tag, a, b = call.outputs[0], call.input.to(dtype), call.grad_output[0].to(dtype)
    if not isinstance(tag, Rows) and asked.packing is None:
        a, b = (samples_first(x, tag, asked.n).flatten(1, -2) for x in (a, b))
        return a, b, None
    of = samples_of(b, tag, asked).expand(*b.shape[:-1], 1).reshape(-1)  # [M]
    order, offsets = in_line(of, asked.samples)
    order = order[: int(offsets[-1])]  # without nobody's
    return a.flatten(0, -2)[order], b.flatten(0, -2)[order], offsets


def _rank_one(D: Tensor) -> tuple[Tensor, Tensor]:
    """The outer product nearest to ``D`` in least squares, by power iteration from its row means (D is near rank one)."""
    col = D.abs().mean(0)
    for _ in range(8):
        row = D @ col / col.square().sum().clamp_min(torch.finfo(D.dtype).tiny)
        col = D.mT @ row / row.square().sum().clamp_min(torch.finfo(D.dtype).tiny)
    return row, col
