"""The definitions of the bilinear forms between recorded layer calls and a direction ``P``: plain PyTorch, exact in float64.

Whatever computes them faster must compute these. ``a, b`` are a layer call's input and output gradient.
"""

import torch
from torch import Tensor


def contract(a: Tensor, b: Tensor, P: Tensor, P_bias: Tensor | None = None) -> Tensor:
    """``sum over outputs of (a @ P.T + P_bias) * b``, per token.

    a ``[..., d_in]``, b ``[..., d_out]``, P ``[K, d_out, d_in]``, P_bias ``[K, d_out]`` -> ``[..., K]``.
    """
    out = (a @ P.flatten(0, 1).mT).unflatten(-1, P.shape[:2])  # [..., K, d_out]
    out = out if P_bias is None else out + P_bias
    return (out * b.unsqueeze(-2)).sum(-1)


def contract_grouped(a: Tensor, b: Tensor, P: Tensor, ends: Tensor) -> Tensor:
    """``sum over outputs of (a @ P[e]) * b``, per row; ``e`` is the expert that the row lies before the end of, 0 past the last.

    a ``[N, d_in]``, b ``[N, d_out]``, P ``[E, d_in, d_out]``, ends ``[E]`` -> ``[N]``.
    """
    scores, start = a.new_zeros(len(a)), 0
    for p, end in zip(P, ends.tolist(), strict=True):
        scores[start:end] = ((a[start:end] @ p) * b[start:end]).sum(-1)
        start = end
    return scores


def sum_samples(scores: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Per-token scores ``[n, T, K]``, or ``[N, K]`` of ragged samples, summed to ``[n, K]``."""
    return scores.sum(1) if offsets is None else torch.segment_reduce(scores, "sum", offsets=offsets)


def wgrad_score(a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight gradient ``b.T @ a`` over all tokens and ``< P , b_i.T @ a_i >`` of every sample.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, or ``[N, d]`` with ``offsets [n + 1]``; P ``[K, d_out, d_in]``
    -> ``[d_out, d_in]``, ``[n, K]``.
    """
    return torch.einsum("...o,...i->oi", b, a), sum_samples(contract(a, b, P), offsets)


def ghost_gram(
    a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, row: Tensor | None = None, col: Tensor | None = None,
    offsets: Tensor | None = None, offsets2: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``< D * g_i , g_j >`` of a linear layer for ``D = outer(row, col)``, as activation Gram times output-gradient Gram.

    a ``[n, T, d_in]``, b ``[n, T, d_out]``, a2 ``[m, U, d_in]``, b2 ``[m, U, d_out]``, each pair or ``[N, d]`` with offsets;
    row ``[d_out]``, col ``[d_in]`` -> ``[n, m]``.
    """
    n, m = (x.shape[:-1] if o is None else (len(o) - 1,) for x, o in ((a, offsets), (a2, offsets2)))
    a = a if col is None else a * col
    b = b if row is None else b * row
    pairs = (a.flatten(0, -2) @ a2.flatten(0, -2).mT) * (b.flatten(0, -2) @ b2.flatten(0, -2).mT)  # [tokens, tokens]
    pairs = sum_samples(pairs if offsets is not None else pairs.unflatten(0, n), offsets).mT
    return sum_samples(pairs.contiguous() if offsets2 is not None else pairs.unflatten(0, m), offsets2).mT.contiguous()


def embedding_score(indices: Tensor, b: Tensor, P: Tensor, padding_idx: int | None = None) -> Tensor:
    """``P[k, indices] . b`` per token, 0 at ``padding_idx``.

    indices ``[...]``, b ``[..., d]``, P ``[K, rows, d]`` -> ``[..., K]``.
    """
    scores = torch.stack([(p[indices] * b).sum(-1) for p in P], -1)
    return scores if padding_idx is None else scores * (indices != padding_idx % P.shape[1]).unsqueeze(-1)


def norm_score(x: Tensor, b: Tensor, P_weight: Tensor, P_bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """``(x_hat * P_weight + P_bias) . b`` per token, for the ``layer`` or ``rms`` norm of the last dimension.

    x and b ``[..., d]``, P_weight and P_bias ``[K, d]`` -> ``[..., K]``.
    """
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x_hat = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    scores = (x_hat * b) @ P_weight.mT
    return scores if P_bias is None else scores + b @ P_bias.mT
