"""Per-sample gradients from recorded calls, a block at a time: for pairwise matrices and for the exact game."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adam_ghost.capture.calls import Call
from adam_ghost.scores.anything import call_gradients
from adam_ghost.scores.forms import Asked, form_of


def sample_gradients(calls: Sequence[Call], name: str, p: Tensor, asked: Asked, block: slice = slice(None)) -> Tensor:
    """``[n, *p[block].shape]``: each sample's share of ``p.grad`` through all of ``calls``, for a block of p's first dimension."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    n = asked.samples
    total = p.new_zeros((n, *p[block].shape), dtype=dtype) if p.ndim else p.new_zeros((n,), dtype=dtype)
    for call in calls:
        if name not in call.parameters():
            continue
        form = form_of(call)
        if form is not None and form.sample_gradients is not None:
            total += form.sample_gradients(call, name, asked, block)
        else:
            for i, (g,) in enumerate(call_gradients(call, [name], asked)):
                if g is not None:
                    total[i] += g[block] if p.ndim else g
    return total
