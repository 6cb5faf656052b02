"""Ledgers without training: their scores follow from a seed."""

import numpy as np

from adam_ghost.ledger.books import Arrived, Audit, StepRecord
from adam_ghost.ledger.writer import LedgerWriter

BATCH = 4


def step(number, *, name=int, ids=range(20), targets=1, gap=0.0, coverage=1.0, r=None, alone=None, drop=None, seed=0, tokens=False):
    random = np.random.default_rng((seed, number))
    scores = random.normal(0, 1, (BATCH, targets))
    total = scores.sum(0)
    found = Arrived(
        StepRecord(number, BATCH, [1e-3], [1.0] * targets, True, total.tolist(), [], [0.0] * targets, coverage, False, 0.01),
        [name(i) for i in random.choice(list(ids), BATCH).tolist()],
        scores,
    )
    size = np.maximum(np.abs(total), np.sqrt(np.square(scores).sum(0)))
    found.record.total = (total + gap * size).tolist()
    if tokens:  # three of each sample, which add up to its score
        found.tokens = [(i, np.outer([0.5, 0.25, 0.25], s).astype(np.float32)) for i, s in zip(found.ids, scores, strict=True)]
        found.record.tokens = BATCH
    if r is not None:
        found.record.audit = Audit(r, 0.1, total.tolist() if drop is None else [drop] * targets, alone)
    return found


def write(folder, parts=3, steps=5, *, rank=0, **options):
    """``parts`` parts of ``steps`` steps each; options as above. Returns the steps."""
    writer = LedgerWriter(folder, rank=rank)
    made = []
    for part in range(parts):
        for i in range(steps):
            made.append(step(part * steps + i + 1, **options))
            writer.begin(made[-1].ids, lambda: {"model": "made"})
            writer.add(made[-1])
        writer.flush()
    writer.close()
    return made


def totals(steps):
    """{id: sum of its scores}, by a loop."""
    found = {}
    for s in steps:
        for i, score in zip(s.ids, s.scores[:, 0].tolist(), strict=True):
            found[i] = found.get(i, 0.0) + score
    return found
