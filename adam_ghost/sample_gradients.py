"""Per-sample gradients from recorded calls, a block at a time: for pairwise matrices and for the exact game."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from adam_ghost.batching import Tag
from adam_ghost.calls import Call
from adam_ghost.layers import layer_kind


def samples_first(x: Tensor, tag: Tag, n: int) -> Tensor:
    """``x`` with its samples along dimension 0, then its tokens (size 1 if it has none), then the rest: ``[n, T, ...]``."""
    axis, rows = tag
    x = x.movedim(axis, 0)
    if rows > 1:
        return x.unflatten(0, (n, rows))
    return x if x.ndim > 2 else x.unsqueeze(1)


def call_gradients(call: Call, params: Sequence[nn.Parameter], n: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Per sample, the gradients of ``params`` through this call: its backward pass with the other samples' share zeroed."""
    with torch.enable_grad():
        leaves = [p.detach().to(torch.promote_types(p.dtype, torch.float32)).requires_grad_() for p in params]
        replayed = call.replay({id(p): v for p, v in zip(params, leaves, strict=True)})
        outs = [replayed[i] for i in call.grad_output]
    for i in range(n):
        shares = []
        for (k, grad), out in zip(call.grad_output.items(), outs, strict=True):
            axis, rows = call.outputs[k]
            share = torch.zeros_like(out)
            share.narrow(axis, i * rows, rows).copy_(grad.narrow(axis, i * rows, rows))
            shares.append(share)
        yield torch.autograd.grad(outs, leaves, shares, retain_graph=i < n - 1, allow_unused=True)


def sample_gradients(calls: Sequence[Call], p: nn.Parameter, n: int, block: slice = slice(None)) -> Tensor:
    """``[n, *p[block].shape]``: each sample's share of ``p.grad`` through all of ``calls``, for a block of p's first dimension."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    total = p.new_zeros((n, *p[block].shape), dtype=dtype) if p.ndim else p.new_zeros((n,), dtype=dtype)
    for call in calls:
        if not any(q is p for q in call.parameters()):
            continue
        kind = layer_kind(call.fn)
        if kind in ("linear", "conv1d"):
            a, b = (
                samples_first(x, call.outputs[0], n).flatten(1, -2).to(dtype)  # [n, T, d]
                for x in (call.input, call.grad_output[0])
            )
            if p is call.fn.bias:
                total += b.sum(1)[:, block]
                continue
            rows, cols = (a, b) if kind == "conv1d" else (b, a)
            total += rows[..., block].mT @ cols
        else:
            for i, (g,) in enumerate(call_gradients(call, [p], n)):
                if g is not None:
                    total[i] += g[block] if p.ndim else g
    return total
