"""Scores of single tokens: in which steps, of which samples, and how they come out of a step's contraction."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.capture.rows import Packing
from adam_ghost.ledger.ids import normalise
from adam_ghost.processes.world import World
from adam_ghost.scores.forms import Directions
from adam_ghost.scores.shapes import sum_samples
from adam_ghost.step.step import Step

SCHEDULES = ("midpoint", "gauss")  # that keep the layer calls until they can be asked by token


class TokenChoice(NamedTuple):
    """All samples of every ``every``-th attributed step, or the samples ``ids`` whenever they come."""

    every: int | None = None
    ids: frozenset[Hashable] = frozenset()

    def places(self, ids: Sequence[Hashable], attributed: int) -> list[int]:
        """Of a batch of ``ids``, after so many attributed steps: the places of the samples whose tokens are scored."""
        if self.every is not None:
            return list(range(len(ids))) if attributed % self.every == 0 else []
        return [i for i, name in enumerate(ids) if name in self.ids]


class TokenScores(NamedTuple):
    """Of a micro-batch: its tokens' scores in a line, sample ``i``'s from ``offsets[i]`` to ``offsets[i + 1]``."""

    places: list[int]  # of the samples that were asked for
    line: Tensor  # [N, K]
    offsets: Tensor  # [n + 1]


def choose(tokens: Any, schedule: str, ledger: Any, world: World) -> TokenChoice:
    """What ``InRun(tokens=...)`` asks for.

    Raises:
        TypeError: ``tokens`` is neither a number nor ids.
        ValueError: it cannot be had, or would go nowhere.
    """
    if tokens is None:
        return TokenChoice()
    if isinstance(tokens, bool) or not isinstance(tokens, (int, Iterable)):
        raise TypeError(f"tokens must be a number of steps, or a list of sample ids, got {type(tokens).__name__} {tokens!r}")
    if isinstance(tokens, int) and tokens < 1:
        raise ValueError(f"tokens must be a positive number of steps, or a list of sample ids, got {tokens}")
    if schedule not in SCHEDULES:
        raise ValueError(f"tokens needs a schedule that keeps layer calls, {' or '.join(SCHEDULES)}; got schedule={schedule!r}")
    if ledger is None:
        raise ValueError("tokens needs ledger=: scores of single tokens are kept nowhere else")
    if world.sharded:
        raise ValueError("tokens cannot be scored where fully_shard shards the model: audit a run of one process")
    if isinstance(tokens, int):
        return TokenChoice(every=tokens)
    return TokenChoice(ids=frozenset(normalise(list(tokens) if isinstance(tokens, (set, frozenset)) else tokens)))


def score_tokens(step: Step, P: Directions, asked: Sequence[list[int]], half: bool) -> tuple[Tensor, list[TokenScores | None]]:
    """A step's scores ``[n, K]``, and those of the tokens of its micro-batches; ``asked``: of which samples of each, by place.

    Raises ValueError where a layer's outputs have no tokens.
    """
    scores: list[Tensor] = []
    found: list[TokenScores | None] = []
    for i, places in enumerate(asked):
        own = replace(step, recordings=step.recordings[i : i + 1], passes=step.passes[i : i + 1])
        if places:
            try:
                by_token = own.scores(P, per_token=True, half=half)  # [rows, T, K]
            except ValueError as error:
                raise ValueError(f"tokens cannot be scored: {str(error).removeprefix('per_token=True ')}") from error
            packing = step.recordings[i].packing
            scores.append(sum_samples(by_token, packing))
            found.append(TokenScores(places, *_in_line(by_token, packing)))
        else:
            scores.append(own.scores(P, half=half))
            found.append(None)
        step.whole, step.missing = own.whole, own.missing  # a pass may turn out to have no forward mode
    return torch.cat(scores), found


def _in_line(by_token: Tensor, packing: Packing | None) -> tuple[Tensor, Tensor]:
    line = by_token.flatten(0, 1)
    if packing is None:
        return line, torch.arange(len(by_token) + 1) * by_token.shape[1]
    return line if packing.order is None else line[packing.order], packing.offsets
