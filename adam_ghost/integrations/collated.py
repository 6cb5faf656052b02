"""Whose the rows and tokens of a batch are that somebody else's collator made of samples."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


def lay_out(ids: Sequence[Any], samples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.batch`` is to be told of ``batch``: ``ids``, ``offsets`` (a list, or None) and ``views``.

    Three ways of TRL's collators are known, beside a row to a sample: pairs (samples with ``chosen_ids`` and ``rejected_ids``) are
    all chosen answers and then all rejected ones; samples one after another in a single row; and rows that were packed of several
    samples, whose ids are lists, one id to a token.

    Args:
        ids: one to each of ``samples``, or a list of one to each token of it.
        samples: what the collator was given.
        batch: what it returned.

    Raises:
        ValueError: ``samples`` are in rows where their tokens are not found.
    """
    n, rows = len(samples), next((len(x) for x in batch.values() if isinstance(x, Tensor) and x.ndim), 0)
    tokens = batch.get("input_ids")
    by_token = any(isinstance(i, list) for i in ids)
    in_one_row = rows == 1 < n and isinstance(tokens, Tensor)
    if by_token or in_one_row:
        assert isinstance(tokens, Tensor)
        names, offsets = _pieces(ids, samples, tokens)
        return {"ids": names, "offsets": offsets, "views": 1}
    pairs = rows == 2 * n and {"chosen_ids", "rejected_ids"} <= set(samples[0])
    return {"ids": list(ids), "offsets": None, "views": 2 if pairs else 1}


def _pieces(ids: Sequence[Any], samples: Sequence[Mapping[str, Any]], tokens: Tensor) -> tuple[list[Hashable], list[int]]:
    """The samples in ``tokens [rows, T]`` in a line, and where each begins; padding belongs to the one before it."""
    names: list[Hashable] = []
    offsets: list[int] = []
    line, width = tokens.flatten(), tokens.shape[1]
    at = 0
    for row, (name, sample) in enumerate(zip(ids, samples, strict=True)):
        at = row * width if len(tokens) == len(samples) else at
        own = torch.as_tensor(sample["input_ids"], dtype=line.dtype)
        if not torch.equal(line[at : at + len(own)].cpu(), own):
            raise ValueError(f"the collator did not put the tokens of sample {name} one after another at {at} of its batch")
        for piece, its_tokens in groupby(name if isinstance(name, list) else [name] * len(own)):
            names.append(piece)
            offsets.append(at)
            at += len(list(its_tokens))
    return names, [*offsets, len(line)]
