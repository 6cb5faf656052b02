"""What scores are used for, each from data to a model trained with and without: the tables of docs/using-scores.md.

Digits with wrong labels and short texts, float32; the test samples are seen by no score. Every training of a use takes as many
steps and samples, so that nothing but the choice of samples differs.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler

import adam_ghost as ag
from adam_ghost.demo.data import DOMAINS
from adam_ghost.run.totals import SampleScores, Totals
from adam_ghost.use import AttributionSampler, keep, weights
from adam_ghost.use.weighing import STRENGTH
from bench.evidence import choosing
from bench.evidence.measure import rounded
from bench.evidence.scoring import copied, training
from bench.evidence.studies import compared
from bench.evidence.tasks import Task, digits, texts
from bench.statistics import correlation

SEEDS = range(5)
RATE = 3e-3
Rows = dict[str, dict[str, float]]  # way -> measure -> value
EVERYTHING, RANDOM, BY_SCORE, BY_LOSS = "everything", "random", "by score", "by loss"


def scored(task: Task, schedule: str, **options: Any) -> tuple[ag.InRun, Tensor, Tensor]:
    """A training's closed run; each sample's training losses summed up, and standardised within its steps: the mean."""
    task = copied(task)
    optimizer = task.optimizer()
    N = len(task.samples[0])
    summed, standardised = torch.zeros(2, N)
    met = torch.zeros(N)
    if schedule == "window":
        options |= {"train_loss": task.loss, "window": 25, "ahead": 25}
    with ag.InRun(task.model, optimizer, task.val_loss, schedule, **options) as run:
        for _, index, batch in training(task, optimizer):
            run.batch(index, inputs=batch)
            losses = task.losses(task.model(batch[0]), *batch[1:])
            losses.mean().backward()
            losses = losses.detach()
            summed[index] += losses
            standardised[index] += (losses - losses.mean()) / losses.std()
            met[index] += 1
    return run, summed, standardised / met.clamp(min=1)


def by_place(scores: SampleScores, value: str, N: int) -> Tensor:
    """``[N]``: the samples' scores in the data's order."""
    out = torch.zeros(N)
    out[torch.tensor(scores.ids)] = torch.from_numpy(getattr(scores, value)).float()
    return out


def mask(ids: Any, N: int) -> Tensor:
    return torch.zeros(N, dtype=torch.bool).index_fill(0, torch.as_tensor(ids), True)


# finding bad data, and pruning: one scored training for both


def bad_data(seed: int) -> dict[str, Rows]:
    """A fifth of the labels is wrong: as many samples are left out; then half and more of all. Windows, standardised."""
    task = digits(seed, RATE, epochs=5).single()
    N = len(task.bad)
    run, losses, _ = scored(task, "window")
    scores, random = run.scores(), torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    least = 1 - float(task.bad.double().mean())

    def kept(share: float) -> dict[str, Tensor]:
        k = round(share * N)
        ways = {RANDOM: random[:k], BY_LOSS: losses.argsort()[:k], BY_SCORE: keep(scores, share)}
        return {name: mask(ids, N) for name, ids in ways.items()}

    everything = {EVERYTHING: torch.ones(N, dtype=torch.bool)}
    sets = {
        "bad data": kept(least) | {"the right labels": ~task.bad} | everything,
        "pruning, half": kept(0.5) | everything,
        "pruning, a fifth": kept(0.2) | everything,
    }
    outcomes = iter(choosing.outcome(task, [task.choosing(x, seed) for ways in sets.values() for x in ways.values()]))
    rows = {use: {name: next(outcomes) for name in ways} for use, ways in sets.items()}
    for name, x in sets["bad data"].items():
        rows["bad data"][name]["wrong"] = float(task.bad[x].double().mean())
    return rows | {"drawing": drawn_by_scores(task, seed)}


def drawn_by_scores(task: Task, seed: int) -> Rows:
    """One training whose batches are drawn by its own running scores, by minus its losses so far in their place, or at random."""
    size, N = len(task.batches[0]), len(task.bad)
    rows = {}
    for name, strength in ((RANDOM, 0.0), (BY_LOSS, 1.0), (BY_SCORE, 1.0)):
        t = copied(task)
        optimizer = t.optimizer()
        losses_so_far = Totals()
        options = {"refresh": 5 * size, "num_samples": size * len(t.batches), "strength": strength}
        with ag.InRun(t.model, optimizer, t.val_loss) as run:
            sampler = AttributionSampler(run, range(N), generator=torch.Generator().manual_seed(seed), **options)
            for index in BatchSampler(sampler, size, drop_last=True):
                batch = t.take(torch.tensor(index))
                run.batch(index)
                losses = t.losses(t.model(batch[0]), *batch[1:])
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                losses_so_far.add(index, -losses.detach().double().numpy()[:, None])
                if name == BY_LOSS:
                    sampler.scores = losses_so_far.read(squeeze=True)
        rows[name] = choosing.tested(t)
    return rows


# weighing domains


def domains(seed: int) -> dict[str, Rows]:
    """Prose, code and garbled prose for a model of prose: each drawn as often as its weight says."""
    task = texts(seed, RATE, epochs=4).single()
    names = [DOMAINS[int(g)] for g in task.groups]
    with TemporaryDirectory() as folder, catch_warnings():
        filterwarnings("ignore", "adam_ghost: no weight is recommended")
        _, _, losses = scored(task, "lookahead", ledger=Path(folder, "run"))
        by_score = weights(Path(folder, "run"), by=dict(enumerate(names)))
    mean_loss = torch.stack([losses[task.groups == d].mean() for d in range(len(DOMAINS))])
    each = {
        EVERYTHING: torch.ones(len(DOMAINS)),
        RANDOM: torch.tensor([by_score[d] for d in DOMAINS]).roll(1 + seed % 2),
        BY_LOSS: (-STRENGTH * mean_loss).exp(),
        BY_SCORE: torch.tensor([by_score[d] for d in DOMAINS]),
    }
    size, steps = len(task.batches[0]), len(task.batches)
    batches = []
    for w in each.values():
        generator = torch.Generator().manual_seed(seed)
        batches.append(list(torch.multinomial(w[task.groups], size * steps, True, generator=generator).split(size)))
    rows = dict(zip(each, choosing.outcome(task, batches), strict=True))
    for name, w in each.items():
        share = w[task.groups]
        rows[name]["prose"] = float(share[task.groups == DOMAINS.index("prose")].sum() / share.sum())
    return {"domains": rows}


# crediting sources

SOURCES, LEFT_OUT = 10, 3


def sources(seed: int) -> dict[str, Rows]:
    """Ten sources of a hundred digits, of whose labels none to 90% are wrong: the three of least credit are left out."""
    task = digits(seed, RATE, epochs=5).single()
    N = len(task.bad)
    generator = torch.Generator().manual_seed(seed + 7)
    source = torch.arange(N) % SOURCES
    y = right_labels(seed)[:N]
    bad = torch.rand(N, generator=generator) < source / SOURCES
    y = torch.where(bad, (y + torch.randint(1, 10, (N,), generator=generator)) % 10, y)
    task = replace(task, samples=(task.samples[0], y), bad=bad, groups=source)
    run, losses, _ = scored(task, "window")
    of_source = lambda x: torch.stack([x[source == s].sum() for s in range(SOURCES)])  # noqa: E731
    credit = {
        RANDOM: torch.rand(SOURCES, generator=generator),
        BY_LOSS: -of_source(losses),
        BY_SCORE: of_source(by_place(run.scores(), "total", N)),
    }
    kept = {name: ~torch.isin(source, x.argsort()[:LEFT_OUT]) for name, x in credit.items()}
    without = {f"without {s}": source != s for s in range(SOURCES)}
    sets = kept | {EVERYTHING: torch.ones(N, dtype=torch.bool)} | without
    rows = dict(zip(sets, choosing.outcome(task, [task.choosing(x, seed) for x in sets.values()]), strict=True))
    worth = torch.tensor([rows[name]["loss"] for name in without])
    for name, x in credit.items():
        rows[name]["foretold"] = correlation(x, worth, ranks=True)
    return {"sources": {name: rows[name] for name in (*credit, EVERYTHING)}}


def right_labels(seed: int) -> Tensor:
    """``[1797]``: of ``digits(seed)``, whose order of samples is its first draw."""
    labels = torch.tensor(load_digits(return_X_y=True)[1])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


# a spike

AT, BROKEN, AFTER = 60, 25, 3


def spike(seed: int) -> dict[str, Rows]:
    """In step 60 half of the batch comes with the label 0, whatever it shows, at ten times the usual learning rate.

    The step is the one whose samples' scores have the lowest sum, the samples those of the lowest score in it; training is done
    again without these, to three steps after it.
    """
    task = digits(seed, 1e-2, epochs=5).single()
    N, size = len(task.bad), len(task.batches[0])
    x, y = task.samples
    batches = [b.clone() for b in task.batches[: AT + AFTER]]
    batches[AT - 1][:BROKEN] = torch.arange(N, N + BROKEN)
    samples = torch.cat([x, x[:BROKEN]]), torch.cat([y, torch.zeros_like(y[:BROKEN])])
    task = replace(task, samples=samples, batches=batches)
    t = copied(task)
    optimizer = t.optimizer()
    losses = []
    with TemporaryDirectory() as folder, ag.InRun(t.model, optimizer, t.val_loss, ledger=Path(folder, "run")) as run:
        for _, index, batch in training(t, optimizer):
            run.batch(index)
            each = t.losses(t.model(batch[0]), *batch[1:])
            each.mean().backward()
            losses.append(each.detach())
        run.flush()
        at = min(run.steps, key=lambda step: step.score_sum[0]).step
        with ag.open_ledger(Path(folder, "run")) as ledger:
            of_step = dict(zip(*(ledger.scores(steps=(at, at))[name].to_pylist() for name in ("sample", "score")), strict=True))
    credit = torch.tensor([of_step[i] for i in task.batches[at - 1].tolist()])
    k = size - BROKEN
    random = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    kept = {
        EVERYTHING: torch.ones(size, dtype=torch.bool),
        RANDOM: mask(random[:k], size),
        BY_LOSS: mask(losses[at - 1].argsort()[:k], size),
        BY_SCORE: mask(credit.argsort(descending=True)[:k], size),
        "the broken ones": task.batches[at - 1] < N,
    }
    left = torch.stack([m.float() / m.float().mean() for m in kept.values()])
    states = task.train(task.start(len(kept)), 1, AT + AFTER, lambda step: left if step == at else torch.ones(len(kept), size))
    values = zip(task.outcomes(states, task.test).mean(1).tolist(), task.accuracy(states).tolist(), strict=True)
    rows = {name: {"loss": x, "accuracy": a} for name, (x, a) in zip(kept, values, strict=True)}
    for name, m in kept.items():
        rows[name]["broken left"] = float((task.batches[at - 1][m] >= N).sum()) / BROKEN if at == AT else 1.0
    return {"spike": rows}


def steps(seed: int) -> dict[str, Rows]:
    """Half of each step's candidates, a fifth of which have wrong labels."""
    found = choosing.measure_steps(digits(seed, RATE, epochs=5).single(), seed)["rows"]
    return {"steps": {row.pop("way"): row for row in found}}


USES: list[Callable[[int], dict[str, Rows]]] = [bad_data, domains, sources, spike, steps]


def measure(tell: Callable[[str], None], seeds: Any = SEEDS) -> dict[str, Any]:
    """Use -> way -> measure: mean and 95% interval over seeds, and of the paired differences to what it is compared with."""
    found: dict[str, list[Rows]] = {}
    for seed in seeds:
        for use in USES:
            for name, rows in use(seed).items():
                found.setdefault(name, []).append(rows)
            tell(f"seed {seed}: {use.__name__}")
    return rounded({name: compared(rows, RANDOM) for name, rows in found.items()})


COLUMNS = {"accuracy": "test accuracy", "loss": "test loss"}


def table(found: dict[str, Any], use: str, extra: dict[str, str] | None = None) -> str:
    """A use's table in docs/using-scores.md; ``extra``: further measures and their columns."""
    extra = extra or {}
    heads = [head for name in COLUMNS.values() for head in (name, "less random's")] + list(extra.values())
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for way, measures in found[use].items():
        cells = []
        for name, digits_shown in (("accuracy", 3), ("loss", 2)):
            of = measures[name]
            cells += [f"{of['mean']:.{digits_shown}f}", _difference(of, digits_shown)]
        cells += [f"{measures[name]['mean']:.2f}" if name in measures else "" for name in extra]
        lines.append(f"| {' | '.join([way, *cells])} |")
    return "\n".join(lines)


def _difference(of: dict[str, float], digits_shown: int) -> str:
    """The paired difference to random, with half its 95% interval; bold where that does not hold zero."""
    if "behind" not in of:
        return ""
    text = f"{-of['behind']:+.{digits_shown}f} +- {of['behind_half']:.{digits_shown}f}"
    return f"**{text}**" if abs(of["behind"]) > of["behind_half"] else text


# marker on the page -> the table's arguments
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "bad data": ("bad data", {"wrong": "wrong among the kept"}),
    "domains": ("domains", {"prose": "share of prose"}),
    "pruning, half": ("pruning, half", {}),
    "pruning, a fifth": ("pruning, a fifth", {}),
    "drawing": ("drawing", {}),
    "sources": ("sources", {"foretold": "rank correlation"}),
    "spike": ("spike", {"broken left": "broken left"}),
    "steps": ("steps", {}),
}


def page(text: str, found: dict[str, Any]) -> str:
    """docs/using-scores.md with its tables made anew."""
    for marker, (use, extra) in TABLES.items():
        start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        before, rest = text.split(start)
        text = before + start + table(found, use, extra) + "\n" + end + rest.split(end)[1]
    return text
