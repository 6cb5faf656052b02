"""Attention among rows of several samples: whose a result is, where its segments or its mask let no row see another sample's."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adam_ghost.capture.declared import FOLLOWED, visible
from adam_ghost.capture.names import functions
from adam_ghost.capture.rows import MOVES, NOBODY

# the first arguments of functions that attend within the segments ``cu_seqlens`` [segments + 1] of rows [M, heads, d]
_SEGMENTED = ("query", "key", "value", "cu_seq_q", "cu_seq_k")
_MASKED = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_FUNCTIONS: dict[Callable, tuple[str, ...]] = {f: _MASKED for f in functions("F.scaled_dot_product_attention")}
_OPERATORS = {"torch_attn._varlen_attn": _SEGMENTED}  # torch.nn.attention.varlen

# custom functions of the flash-attn library, by their modules and names
_LIBRARY = "flash_attn.flash_attn_interface", "FlashAttnVarlenFunc"
_PADDING = "flash_attn.bert_padding"


def declare_attention() -> None:
    """Has attention within segments, and the ways into it and out of it, followed in a library that is loaded."""
    module, name = _LIBRARY
    _follow(module, name, lambda run: _FUNCTIONS.update({run: _SEGMENTED}))
    _follow(_PADDING, "IndexFirstAxis", lambda run: MOVES.update({run: _taken}))
    _follow(_PADDING, "IndexPutFirstAxis", lambda run: MOVES.update({run: _put}))


def _follow(module: str, name: str, known: Callable[[Callable], None]) -> None:
    function = getattr(sys.modules.get(module), name, None)
    if function is not None and function not in FOLLOWED:
        known(visible(function))
        FOLLOWED.add(function)


def _taken(func: Callable, of: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    return of.expand(len(x), *of.shape[1:])[indices]


def _put(func: Callable, of: Tensor, x: Tensor, indices: Tensor, size: int) -> Tensor:
    of = of.expand(len(x), *of.shape[1:])
    return of.new_full((size, *of.shape[1:]), NOBODY).index_copy(0, indices, of)


def names_of(func: Callable) -> tuple[str, ...] | None:
    """The names of the first arguments of a function of attention; None of any other."""
    return _OPERATORS.get(str(func)) if isinstance(func, torch._ops.OpOverloadPacket) else _FUNCTIONS.get(func)


def sees_its_own(names: tuple[str, ...], bound: list[Any], queries: Tensor, keys: Tensor) -> Tensor:
    """``[]`` bool: whether no query sees a key of another sample, in a call of a function with these ``names``.

    ``queries``, ``keys``: the samples of either's rows, as they broadcast to ``query`` and to ``key``, or ``value``.
    """
    if names is _SEGMENTED:
        return _by_segments(bound[3], bound[4], queries.flatten(), keys.flatten(), len(bound[0]), len(bound[1]))
    mask, causal = bound[3] if len(bound) > 3 else None, bound[5] if len(bound) > 5 else False
    apart = (queries != keys.mT) & (keys.mT != NOBODY)  # [..., T, S], or 1 where all belongs together
    if isinstance(mask, Tensor):
        # what a mask adds leaves nothing of a key beyond half of the type's range
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        apart = apart & (seen | ~seen.any(-1, keepdim=True))  # where it leaves none, all weigh the same
    elif causal:
        apart = apart & apart.new_ones(bound[0].shape[-2], bound[1].shape[-2]).tril()
    return ~apart.any()


def _by_segments(starts_q: Tensor, starts_k: Tensor | None, queries: Tensor, keys: Tensor, T: int, S: int) -> Tensor:
    starts_k = starts_q if starts_k is None else starts_k
    of_key, keys = _segment_of(starts_k, S), keys.expand(S)
    # the first and last sample among a segment's keys; of nobody's keys it has none
    empty = keys.new_zeros(len(starts_k))
    last = empty.fill_(NOBODY).scatter_reduce(0, of_key, keys, "amax")
    everybody = torch.iinfo(keys.dtype).max
    first = torch.full_like(empty, everybody).scatter_reduce(0, of_key, torch.where(keys == NOBODY, everybody, keys), "amin")
    of_query = _segment_of(starts_q, T)
    alone = (first[of_query] == queries) & (last[of_query] == queries)
    return (alone | (last[of_query] == NOBODY)).all()


def _segment_of(starts: Tensor, size: int) -> Tensor:
    """``[size]``: the segment of each row, of those that start at ``starts``."""
    rows = torch.arange(size, device=starts.device).to(starts.dtype)
    return (torch.searchsorted(starts, rows, right=True) - 1).clamp(min=0)
