"""The shapes that all forms share: samples first, then tokens, then the rest."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from adam_ghost.capture.batch import Tag
from adam_ghost.capture.rows import NOBODY, Packing, Rows
from adam_ghost.scores.forms import Asked


def add(parts: Iterable[Tensor]) -> Tensor:
    """The sum of at least one tensor, in order."""
    return reduce(torch.add, parts)


def samples_first(x: Tensor, tag: tuple[int, int], n: int) -> Tensor:
    """``x`` with its samples along dimension 0, then its tokens (size 1 if it has none), then the rest: ``[n, T, ...]``."""
    axis, rows = tag
    x = x if axis == 0 else x.movedim(axis, 0)  # [n * rows, ...]
    if rows > 1:
        return x.unflatten(0, (n, rows))
    return x if x.ndim > 2 else x.unsqueeze(1)


def by_token(x: Tensor, tag: tuple[int, int], n: int) -> Tensor:
    """``[n, T]``: sums a call's output-shaped products over everything but sample and token."""
    x = samples_first(x, tag, n)
    return x.flatten(2).sum(-1) if x.ndim > 2 else x


def tokens(scores: Tensor, b: Tensor) -> Tensor:
    """Scores ``[n, rows, K]`` of ``b [n, T, ..., d]``, whose rows they count in a line, as ``[n, T, K]``."""
    return scores.unflatten(1, b.shape[1:-1]).flatten(2, -2).sum(2) if b.ndim > 3 else scores


def by_row(x: Tensor, tag: Rows) -> Tensor:
    """``[M]``: sums a call's output-shaped products over the dimensions along which the index of ``tag`` does not vary."""
    dims = [d for d in range(x.ndim) if tag.of.shape[d] == 1]
    return (x.sum(dims, keepdim=True) if dims else x).flatten()


def lead_rows(x: Tensor, tag: Rows) -> Rows:
    """The tag of the rows of ``x [..., d]`` in a line, ``[M]``."""
    return Rows(tag.of.expand(*x.shape[:-1], 1).reshape(-1), tag.per)


def collect_rows(scores: Tensor, tag: Rows, asked: Asked) -> Tensor:
    """Scores of rows ``[M, K]`` summed to ``[n, K]``, ``[n, T, K]`` per token; the rows that are nobody's are left out."""
    if asked.per_token:
        return sum_rows(scores, tag.of.flatten(), asked.n * tag.per).unflatten(0, (asked.n, tag.per))
    return sum_rows(scores, *owners(tag, asked.n, asked.packing))


def owners(tag: Rows, n: int, packing: Packing | None) -> tuple[Tensor, int]:
    """The samples of the rows of ``tag`` in a line, ``[M]``, and how many samples there are.

    Raises ValueError where rows are not known by token, which ``packing`` needs.
    """
    if packing is None:
        return tag.samples.flatten(), n
    tokens = packing.tokens // n  # to a row of the batch
    if tag.per % tokens:
        raise ValueError(
            f"samples packed in rows of {tokens} tokens: a layer's rows are told apart by {tag.per} to a row of the batch"
        )
    token = tag.of.flatten() if tag.per == tokens else tag.of.flatten().div(tag.per // tokens, rounding_mode="floor")
    return packing.sample_of(token), packing.samples


def samples_of(x: Tensor, tag: Tag, asked: Asked) -> Tensor:
    """The sample of each element of ``x``, a call's output or its gradient, as it broadcasts to ``x``."""
    if not isinstance(tag, Rows):
        axis, per = tag
        shape, dims = [1] * x.ndim, [axis]
        if asked.packing is not None and per == 1:  # tokens are the first dimension but the rows'
            dims.append(0 if axis else 1)
            per = x.shape[dims[1]]
        for d in dims:
            shape[d] = x.shape[d]
        of = torch.arange(asked.n * per, device=x.device).view([x.shape[d] for d in dims])
        tag = Rows((of.mT if dims != sorted(dims) else of).reshape(shape), per)
    return owners(tag, asked.n, asked.packing)[0].view(tag.of.shape)


def sum_rows(x: Tensor, at: Tensor, count: int) -> Tensor:
    """``[count, ...]``: the sums of the rows of ``x [M, ...]`` that go to each place ``at [M]``; in a fixed order."""
    order, offsets = in_line(at, count)
    return torch.segment_reduce(x[order], "sum", offsets=offsets)


def in_line(at: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The order ``[M']`` in which rows at places ``at [M]`` lie in a line, and the places' offsets ``[count + 1]`` in it."""
    line, order = torch.sort(torch.where(at == NOBODY, count, at), stable=True)
    return order, torch.searchsorted(line, torch.arange(count + 1, device=at.device))


def sum_samples(scores: Tensor, packing: Packing | None) -> Tensor:
    """Per-token scores ``[rows, T, K]`` summed to ``[n, K]``: over a row, or over the tokens that ``packing`` gives a sample.

    Raises ValueError where the samples do not end with the batch.
    """
    if packing is None:
        return scores.sum(1)
    line = scores.flatten(0, 1)  # [rows * T, K]
    if packing.tokens != len(line):
        raise ValueError(f"offsets end at {packing.tokens}, but the batch has {len(line)} tokens")
    return torch.segment_reduce(line if packing.order is None else line[packing.order], "sum", offsets=packing.offsets)
