"""The shapes that all forms share: samples first, then tokens, then the rest."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from adam_ghost.capture.batch import Tag
from adam_ghost.capture.recording import Packing


def add(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, in order."""
    return reduce(torch.add, parts)


def samples_first(x: Tensor, tag: Tag, n: int) -> Tensor:
    """``x`` with its samples along dimension 0, then its tokens (size 1 if it has none), then the rest: ``[n, T, ...]``."""
    axis, rows = tag
    x = x if axis == 0 else x.movedim(axis, 0)  # [n * rows, ...]
    if rows > 1:
        return x.unflatten(0, (n, rows))
    return x if x.ndim > 2 else x.unsqueeze(1)


def by_token(x: Tensor, tag: Tag, n: int) -> Tensor:
    """``[n, T]``: sums a call's output-shaped products over everything but sample and token."""
    x = samples_first(x, tag, n)
    return x.flatten(2).sum(-1) if x.ndim > 2 else x


def tokens(scores: Tensor, b: Tensor) -> Tensor:
    """Scores ``[n, rows, K]`` of ``b [n, T, ..., d]``, whose rows they count in a line, as ``[n, T, K]``."""
    return scores.unflatten(1, b.shape[1:-1]).flatten(2, -2).sum(2) if b.ndim > 3 else scores


def sum_samples(scores: Tensor, packing: Packing | None) -> Tensor:
    """Per-token scores ``[rows, T, K]`` summed to ``[n, K]``: over a row, or over the tokens that ``packing`` gives a sample.

    Raises ValueError where the samples do not end with the batch.
    """
    if packing is None:
        return scores.sum(1)
    in_line = scores.flatten(0, 1)  # [rows * T, K]
    if packing.tokens != len(in_line):
        raise ValueError(f"offsets end at {packing.tokens}, but the batch has {len(in_line)} tokens")
    return torch.segment_reduce(in_line, "sum", offsets=packing.offsets)
