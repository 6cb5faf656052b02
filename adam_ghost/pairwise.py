"""Pairwise products of the samples' gradients under Adam's preconditioner: who pulls with whom in this step."""

import torch
from torch import Tensor, nn

from adam_ghost import ops
from adam_ghost.calls import Call
from adam_ghost.layer_cache import LayerCache
from adam_ghost.layers import layer_kind
from adam_ghost.sample_gradients import samples_first
from adam_ghost.state import AdamState
from adam_ghost.step import Step, open_step

_BLOCK_BYTES = 64 * 2**20  # of per-sample gradients held at once


def gram(
    layer_cache: LayerCache, opt_state: "torch.optim.Optimizer | AdamState", *, preconditioner: str | None = "exact"
) -> Tensor:
    """``< D * g_i , g_j >`` for all pairs of the recorded batch, ``[n, n]``, at least float32.

    With Adam's preconditioner ``D = lr * S`` (secant) entry ``[i, j]`` is, to first order, how much sample ``i``'s share of
    the step lowers sample ``j``'s share of the training loss. Needs no validation loss; weights and recording stay.

    Args:
        layer_cache: what ``with layer_cache:`` recorded, with the final ``.grad`` in place.
        opt_state: the optimizer about to step, or an ``AdamState``.
        preconditioner: ``exact`` (elementwise, from blocks of per-sample gradient rows, at most 64 MB at once), ``factored``
            (linear layers by the best rank-one ``D = r c^T`` and ghost Grams, no per-sample gradient; others exact), or
            None (``D = 1``: the plain Gram matrix, without lr).

    Raises:
        ValueError: unknown ``preconditioner``; and as ``attribute``.
    """
    if preconditioner not in ("exact", "factored", None):
        raise ValueError(f"preconditioner must be 'exact', 'factored' or None, got {preconditioner!r}")
    step = open_step(layer_cache, opt_state)
    total: Tensor | int = 0
    for p, g in zip(step.params, step.grads, strict=True):
        D = None
        if preconditioner is not None:
            D = step.state.scaling(p, g) * step.state[p].scalars.lr
        calls = [call for call in layer_cache.recorded.calls if any(q is p for q in call.parameters())]
        if calls and preconditioner == "factored" and p.ndim == 2 and all(layer_kind(c.fn) in ("linear", "conv1d") for c in calls):
            D = D if step.scale is None else D * step.scale[id(p)] ** 2
            total = total + _factored(calls, D, layer_cache.recorded.batch_size)
        else:
            total = total + _exact(step, p, D, layer_cache.recorded.batch_size)
    return total


def _exact(step: Step, p: nn.Parameter, D: Tensor | None, n: int) -> Tensor:
    per_row = max(1, n * p[:1].numel() * 4) if p.ndim else 1
    rows = max(1, _BLOCK_BYTES // per_row)
    total: Tensor | int = 0
    for start in range(0, p.shape[0] if p.ndim else 1, rows):
        block = slice(start, start + rows)
        G = step.sample_gradients(p, block).reshape(n, -1)
        scaled = G if D is None else G * (D[block] if p.ndim else D).reshape(-1)
        total = total + scaled @ G.mT
    return total


def _factored(calls: list[Call], D: Tensor, n: int) -> Tensor:
    row, col = _rank_one(D)
    if layer_kind(calls[0].fn) == "conv1d":
        row, col = col, row
    sides = [[samples_first(x, c.outputs[0], n).flatten(1, -2).to(D.dtype) for x in (c.input, c.grad_output[0])] for c in calls]
    total: Tensor | int = 0
    for i, (a, b) in enumerate(sides):
        total = total + ops.ghost_gram(a, b, row=row, col=col)
        for a2, b2 in sides[:i]:
            across = ops.ghost_gram(a, b, a2, b2, row=row, col=col)
            total = total + across + across.mT
    return total


def _rank_one(D: Tensor) -> tuple[Tensor, Tensor]:
    """The outer product nearest to ``D`` in least squares, by power iteration from its row means (D is near rank one)."""
    col = D.abs().mean(0)
    for _ in range(8):
        row = D @ col / col.square().sum().clamp_min(torch.finfo(D.dtype).tiny)
        col = D.mT @ row / row.square().sum().clamp_min(torch.finfo(D.dtype).tiny)
    return row, col
