"""The demo's main job: train twice from the same start with the same batches, scored step by step and by windows; audit both."""

import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.attribution import attribute
from adam_ghost.demo.data import DOMAINS, VOCABULARY, Corpus
from adam_ghost.demo.model import GPT
from adam_ghost.inrun import InRun
from adam_ghost.layer_cache import LayerCache
from adam_ghost.shapley import exact_shapley

if TYPE_CHECKING:
    from adam_ghost.ledger.writer import LedgerWriter

METHODS = {
    "secant/midpoint": ("secant", "midpoint"),
    "paper (frozen/current)": ("frozen", "current"),
    "SGD (sgd/current)": ("sgd", "current"),
}
BATCH = 32
WINDOW, AHEAD = 16, 16  # steps: as far as credit is linear in so young a model
AUDITED_SAMPLES = 6  # of an audited window's first step


@dataclass(frozen=True)
class Audited:
    """One step's exact game, and each method's Pearson R and relative L2 error against it."""

    step: int
    agreement: dict[str, tuple[float, float]]
    sampling_error: float  # of the exact values themselves, relative L2
    loss_drop: float  # U(B): against the step that history alone would have taken
    score_sum: float


@dataclass(frozen=True)
class AuditedWindow:
    """A window's credit against leaving a few samples out of its first step and training on to its end."""

    step: int  # its first
    ahead: int  # steps from there to its end
    r: float
    relative_l2: float


@dataclass(frozen=True)
class Progress:
    schedule: str
    step: int
    steps: int
    loss: float
    steps_per_second: float
    by_domain: dict[str, tuple[float, float, int]]  # mean total so far, standard error, samples


@dataclass(frozen=True)
class Result:
    """Of every training sample ``[N]``, in the corpus' order, where it was met; NaN where it was not."""

    by_step: np.ndarray  # sum of its one-step scores
    standardized: np.ndarray  # their mean, standardised within steps
    by_window: np.ndarray  # sum of its credit
    window_standardized: np.ndarray  # mean of its credit, standardised within steps
    summed_loss: np.ndarray  # sum of its own training loss, whenever it was met
    met: np.ndarray  # in how many steps
    audits: list[Audited]
    windows: list[AuditedWindow]
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
        self.summed_loss = np.zeros(len(corpus.tokens))

    def losses(self, x: Tensor) -> Tensor:
        """``[n]``"""
        return F.cross_entropy(self.model(x[:, :-1]).transpose(1, 2), x[:, 1:], reduction="none").mean(1)

    def loss(self, x: Tensor) -> Tensor:
        return self.losses(x).mean()

    def target_loss(self) -> Tensor:
        return self.loss(self.corpus.target)

    def next_batch(self) -> list[int]:
        if len(self._order) < BATCH:
            self._order = torch.randperm(len(self.corpus.tokens), generator=self._shuffle).tolist()
        ids, self._order = self._order[:BATCH], self._order[BATCH:]
        return ids

    def step(self, ids: list[int], run: InRun | None) -> float:
        x = self.corpus.tokens[ids]
        if run:
            run.batch(ids, inputs=x)
        losses = self.losses(x)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.summed_loss[ids] += losses.detach().numpy()
        return losses.mean().item()


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
    ledgers: "tuple[LedgerWriter | None, LedgerWriter | None]" = (None, None),
) -> Result:
    """Trains for ``steps``, first scored step by step and then by windows, and calls ``report`` now and then.

    Plays the exact game in ``audits`` steps spread over the first run, and leaves samples out in at most two windows of the second.
    """
    trainer, again = Trainer(corpus, seed), Trainer(corpus, seed)
    audited: list[Audited] = []
    every = max(2, steps // audits)
    with torch.no_grad():
        before = trainer.target_loss().item()

    def game(step: int, ids: list[int]) -> None:
        if step % every == 0:
            audited.append(audit(trainer, ids, step))

    # the ledger has audits of the same steps, of the run's scores; those above compare the methods
    options: dict[str, Any] = {"audit_every": every if ledgers[0] else None, "ledger": ledgers[0]}
    with InRun(trainer.model, trainer.optimizer, trainer.target_loss, **options) as run:
        _run(trainer, run, "one step", steps, report, game)
    with torch.no_grad():
        after = trainer.target_loss().item()

    # of a run so short that it has no ten steps to wait for, windows begin earlier
    options = {"window": WINDOW, "ahead": AHEAD, "train_loss": again.loss, "ledger": ledgers[1]}
    options |= {"audit_every": max(1, steps // WINDOW // 2), "audit_samples": AUDITED_SAMPLES}
    with warnings.catch_warnings():
        # the display says it: the last windows look less far ahead, and what R the audits found
        for message in ("the run ended", "windows of", "the credit of steps"):
            warnings.filterwarnings("ignore", f"adam_ghost: {message}", UserWarning)
        with InRun(again.model, again.optimizer, again.target_loss, "window", **options) as windows:
            _run(again, windows, "windows", steps, report)

    by_step, by_window = run.scores(), windows.scores()
    return Result(
        by_step=_in_order(by_step.ids, by_step.total, corpus),
        standardized=_in_order(by_step.ids, by_step.standardized, corpus),
        by_window=_in_order(by_window.ids, by_window.total, corpus),
        window_standardized=_in_order(by_window.ids, by_window.standardized, corpus),
        summed_loss=np.where(trainer.summed_loss > 0, trainer.summed_loss, np.nan),
        met=np.nan_to_num(_in_order(by_step.ids, by_step.steps, corpus)).astype(int),
        audits=audited,
        windows=[AuditedWindow(s.step, s.horizon, s.audit.r, s.audit.relative_l2) for s in windows.steps if s.audit and s.horizon],
        target_loss=(before, after),
        booked=(sum(s.score_sum[0] for s in run.steps), sum(s.history[0] for s in run.steps)),
    )


def _run(
    trainer: Trainer,
    run: InRun,
    schedule: str,
    steps: int,
    report: Callable[[Progress], None],
    before: Callable[[int, list[int]], None] = lambda step, ids: None,
) -> None:
    """The training loop; ``before`` is called before each step."""
    busy = 0.0
    for step in range(1, steps + 1):
        run.epoch = (step - 1) * BATCH // len(trainer.corpus.tokens)
        ids = trainer.next_batch()
        before(step, ids)
        started = time.perf_counter()
        loss = trainer.step(ids, run)
        busy += time.perf_counter() - started
        if step % max(1, steps // 40) == 0 or step == steps:
            found = run.scores()
            report(
                Progress(
                    schedule,
                    step,
                    steps,
                    loss,
                    step / busy,
                    summarize(_in_order(found.ids, found.total, trainer.corpus), trainer.corpus),
                )
            )


def _in_order(ids: Sequence[Hashable], values: np.ndarray, corpus: Corpus) -> np.ndarray:
    """``[N]`` of the values of samples ``ids``; NaN for the others."""
    found = np.full(len(corpus.tokens), np.nan)
    found[[int(str(i)) for i in ids]] = values
    return found


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


def summarize(values: np.ndarray, corpus: Corpus) -> dict[str, tuple[float, float, int]]:
    """Mean of each domain's samples that have a value, its standard error, and their number."""
    found = {}
    domains = np.array(corpus.domains)
    for domain in DOMAINS:
        x = values[(domains == domain) & ~np.isnan(values)]
        error = float(x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float("nan")
        found[domain] = (float(x.mean()) if len(x) else float("nan"), error, len(x))
    return found


def auroc(values: np.ndarray, corpus: Corpus) -> float:
    """The probability that a clean text of prose has a higher value than a corrupted one."""
    domains, known = np.array(corpus.domains), ~np.isnan(values)
    high, low = values[(domains == "prose") & known], values[(domains == "corrupted") & known]
    if not len(high) or not len(low):
        return float("nan")
    pairs = np.sign(high[:, None] - low[None])
    return float((pairs.mean() + 1) / 2)


class Throughput(NamedTuple):
    """Steps per second with attribution as a share of those of another loop."""

    of_plain: float  # training alone
    of_bound: float  # training, and the bare validation pass that attribution cannot do without


def throughput(corpus: Corpus, rounds: int, seed: int) -> Throughput:
    """The three loops in turn; medians of the rounds' ratios."""
    plain, bound, ours = (Trainer(corpus, seed) for _ in range(3))
    with InRun(ours.model, ours.optimizer, ours.target_loss) as run:
        seconds = []
        for _ in range(rounds + 2):
            took = []
            for trainer, attached in ((plain, None), (bound, None), (ours, run)):
                ids = trainer.next_batch()
                started = time.perf_counter()
                if trainer is bound:
                    torch.autograd.grad(trainer.target_loss(), list(trainer.model.parameters()))
                trainer.step(ids, attached)
                took.append(time.perf_counter() - started)
            seconds.append(took)
    shares = [[took[k] / took[2] for took in seconds[2:]] for k in (0, 1)]
    return Throughput(*map(statistics.median, shares))
