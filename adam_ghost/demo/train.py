"""The demo's main job: train, attribute every step, audit some, and compare with training alone."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.attribution import attribute
from adam_ghost.demo.data import DOMAINS, VOCABULARY, Corpus
from adam_ghost.demo.model import GPT
from adam_ghost.inrun import InRun
from adam_ghost.layer_cache import LayerCache
from adam_ghost.run.totals import SampleScores
from adam_ghost.shapley import exact_shapley

if TYPE_CHECKING:
    from adam_ghost.ledger.writer import LedgerWriter

METHODS = {
    "secant/midpoint": ("secant", "midpoint"),
    "paper (frozen/current)": ("frozen", "current"),
    "SGD (sgd/current)": ("sgd", "current"),
}
BATCH = 32


@dataclass(frozen=True)
class Audited:
    """One step's exact game, and each method's Pearson R and relative L2 error against it."""

    step: int
    agreement: dict[str, tuple[float, float]]
    sampling_error: float  # of the exact values themselves, relative L2
    loss_drop: float  # U(B), against the step without the batch
    score_sum: float


@dataclass(frozen=True)
class Progress:
    step: int
    steps: int
    loss: float
    steps_per_second: float
    by_domain: dict[str, tuple[float, float, int]]  # mean total score, standard error, samples


@dataclass(frozen=True)
class Result:
    scores: SampleScores
    audits: list[Audited]
    by_domain: dict[str, tuple[float, float, int]]
    auroc: dict[str, float]  # clean prose above corrupted, by aggregate
    target_loss: tuple[float, float]  # before and after training
    booked: tuple[float, float]  # what samples' own steps, and what history took off it


class Trainer:
    """A small GPT, AdamW, and the corpus in shuffled epochs of batches."""

    def __init__(self, corpus: Corpus, seed: int):
        torch.manual_seed(seed)
        self.corpus = corpus
        self.model = GPT(VOCABULARY, corpus.tokens.shape[1] - 1, layers=2, width=64, heads=4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self._order: list[int] = []
        self._shuffle = torch.Generator().manual_seed(seed)

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def target_loss(self) -> Tensor:
        return self.loss(self.corpus.target)

    def next_batch(self) -> list[int]:
        if len(self._order) < BATCH:
            self._order = torch.randperm(len(self.corpus.tokens), generator=self._shuffle).tolist()
        ids, self._order = self._order[:BATCH], self._order[BATCH:]
        return ids

    def step(self, ids: list[int], run: InRun | None) -> float:
        if run:
            run.batch(ids)
        loss = self.loss(self.corpus.tokens[ids])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def open_ledger(folder: Path, corpus: Corpus) -> "LedgerWriter | None":
    """The run's ledger, or None where its libraries are not installed."""
    try:
        from adam_ghost.ledger.writer import LedgerWriter
    except ImportError:
        return None

    def describe(i: int) -> dict[str, str]:
        return {"group": corpus.domains[i], "text": corpus.texts[i], "path": corpus.sources[i]}

    return LedgerWriter(folder, describe=describe, restart=True)


def train(
    corpus: Corpus,
    steps: int,
    audits: int,
    seed: int,
    report: Callable[[Progress], None],
    ledger: "LedgerWriter | None" = None,
) -> Result:
    """Trains for ``steps``, calls ``report`` now and then, plays the exact game in ``audits`` steps spread over the run."""
    trainer = Trainer(corpus, seed)
    audited: list[Audited] = []
    due = {max(2, round((k + 1) * steps / audits)) for k in range(audits)}
    with torch.no_grad():
        before = trainer.target_loss().item()
    busy = 0.0
    # the ledger has audits of its own, of the run's scores; those above compare the methods
    every = max(1, steps // min(audits, 2)) if ledger else None
    with InRun(trainer.model, trainer.optimizer, trainer.target_loss, audit_every=every, ledger=ledger) as run:
        for step in range(1, steps + 1):
            run.epoch = (step - 1) * BATCH // len(corpus.tokens)
            ids = trainer.next_batch()
            if step in due:
                audited.append(audit(trainer, ids, step))
            started = time.perf_counter()
            loss = trainer.step(ids, run)
            busy += time.perf_counter() - started
            if step % max(1, steps // 40) == 0 or step == steps:
                report(Progress(step, steps, loss, step / busy, summarize(run.scores(), corpus)))
        scores = run.scores()
        booked = sum(s.score_sum[0] for s in run.steps), sum(s.history[0] for s in run.steps)
    with torch.no_grad():
        after = trainer.target_loss().item()
    domains = np.array([corpus.domains[int(str(i))] for i in scores.ids])
    clean, bad = domains == "prose", domains == "corrupted"
    auroc = {
        "mean score standardised within steps": _auroc(scores.standardized[clean], scores.standardized[bad]),
        "sum of scores": _auroc(scores.total[clean], scores.total[bad]),
    }
    return Result(scores, audited, summarize(scores, corpus), auroc, (before, after), booked)


def audit(trainer: Trainer, ids: list[int], step: int) -> Audited:
    """Plays the exact game of the step about to be taken, on a forward and backward pass of its own."""
    cache = LayerCache(trainer.model, trainer.target_loss)
    with cache:
        trainer.loss(trainer.corpus.tokens[ids]).backward()
    game = exact_shapley(cache, trainer.optimizer, permutations=8, seed=step)
    found = {name: attribute(cache, trainer.optimizer, rule=rule, at=at) for name, (rule, at) in METHODS.items()}
    trainer.optimizer.zero_grad()
    return Audited(
        step,
        {name: game.compare(scores) for name, scores in found.items()},
        float(game.standard_error.norm() / game.values.norm()),
        float(game.total),
        float(next(iter(found.values())).sum()),
    )


def summarize(scores: SampleScores, corpus: Corpus) -> dict[str, tuple[float, float, int]]:
    """Mean total score of each domain's samples, its standard error, and their number."""
    found = {}
    domains = np.array([corpus.domains[int(str(i))] for i in scores.ids])
    for domain in DOMAINS:
        x = scores.total[domains == domain]
        error = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
        found[domain] = (float(x.mean()) if len(x) else float("nan"), error, len(x))
    return found


def _auroc(high: np.ndarray, low: np.ndarray) -> float:
    """The probability that a draw from ``high`` is above one from ``low``."""
    if not len(high) or not len(low):
        return float("nan")
    pairs = np.sign(high[:, None] - low[None])
    return float((pairs.mean() + 1) / 2)


def throughput(corpus: Corpus, rounds: int, seed: int) -> float:
    """Steps per second with attribution as a share of those without: both in turn, median of the rounds' ratios."""
    plain, ours = Trainer(corpus, seed), Trainer(corpus, seed)
    with InRun(ours.model, ours.optimizer, ours.target_loss) as run:
        ratios = []
        for _ in range(rounds + 2):
            seconds = []
            for trainer, attached in ((plain, None), (ours, run)):
                ids = trainer.next_batch()
                started = time.perf_counter()
                trainer.step(ids, attached)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[2:])
