"""Training again on what scores choose: the best samples, domains in other proportions, a part of every step's candidates."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import PolynomialFeatures
from torch import Tensor

import adam_ghost as ag
from adam_ghost import use
from bench.evidence import scoring
from bench.evidence.tasks import TASKS, Task

RATES = {"digits": 1e-3, "texts": 3e-3}  # at which 200 steps learn something
KEPT = (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
COMPARED = ("one step, SGD rule", scoring.STANDARDISED, scoring.SUMMED_LOSS, "EK-FAC (kronfluence)")
RANDOM, EVERYTHING = "random", "everything"


def outcome(task: Task, batches: list[list[Tensor]]) -> list[dict[str, float]]:
    """Loss and accuracy on the test samples after training on each of ``M`` lists of batches, as many steps as the task's."""
    single = task.single()
    states = single.train(
        single.start(len(batches)), 1, len(task.batches), batches=lambda t: torch.stack([b[t - 1] for b in batches])
    )
    losses, right = single.outcomes(states, single.test).mean(1), single.accuracy(states)
    return [{"loss": float(x), "accuracy": float(a)} for x, a in zip(losses, right, strict=True)]


def measure_kept(task: str, seed: int) -> dict[str, Any]:
    """Training anew on the samples that each way ranks highest; equally many full batches, whatever is kept."""
    t = TASKS[task](seed, RATES[task])
    ways = scoring.ways(t, [scoring.DEFAULT])
    ways = {name: ways[name] for name in (*COMPARED, scoring.DEFAULT) if name in ways}
    ways[RANDOM] = torch.rand(len(t.bad), generator=torch.Generator().manual_seed(seed))
    chosen: dict[tuple[str, float], Tensor] = {(EVERYTHING, 1.0): torch.ones(len(t.bad), dtype=torch.bool)}
    for name, scores in ways.items():
        order = scores.argsort(descending=True)
        for share in KEPT:
            chosen[name, share] = torch.zeros(len(t.bad), dtype=torch.bool).index_fill(0, order[: round(share * len(order))], True)
    found = outcome(t, [t.choosing(keep, seed) for keep in chosen.values()])
    return {"rows": [{"way": name, "kept": share} | x for (name, share), x in zip(chosen, found, strict=True)]}


MIXTURES, LEAST = 12, 0.05  # small runs that the regression is fitted to; least share of a domain


def measure_domains(seed: int) -> dict[str, Any]:
    """Proportions of prose, code and garbled prose for a model of prose.

    By one run's scores: each domain as far as its samples' mean score is above that of all. By regression: a polynomial of the
    second degree, fitted to what small runs on random proportions lose (as RegMix, arXiv 2407.01492, does).
    """
    t = TASKS["texts"](seed, RATES["texts"])
    domains = int(t.groups.max()) + 1
    of_domain = [(t.groups == d).nonzero().squeeze(1) for d in range(domains)]

    def drawn(shares: Tensor, steps: int, draw: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        picked = torch.multinomial(shares, steps * len(t.batches[0]), replacement=True, generator=generator).tolist()
        index = torch.stack([of_domain[d][torch.randint(len(of_domain[d]), (), generator=generator)] for d in picked])
        return list(index.split(len(t.batches[0])))

    random = np.random.default_rng(seed)
    mixtures, candidates = (torch.from_numpy(random.dirichlet(np.ones(domains), k)).float() for k in (MIXTURES, 4096))
    single, steps = t.single(), len(t.batches) // 4
    states = single.train(
        single.start(MIXTURES), 1, steps, batches=_stacked([drawn(x, steps, k) for k, x in enumerate(mixtures, 1)])
    )
    losses = single.outcomes(states).mean(1)
    features = PolynomialFeatures(2)
    fitted = RidgeCV(np.logspace(-4, 1, 6)).fit(features.fit_transform(mixtures), losses)
    shares = {
        "uniform": torch.full((domains,), 1 / domains),
        "as the data comes": torch.bincount(t.groups) / len(t.groups),
        f"regression on {MIXTURES} runs of a quarter": candidates[fitted.predict(features.transform(candidates)).argmin()],
    }
    scored = scoring.along(t) | {scoring.DEFAULT: scoring.windows(t, *scoring.WINDOWS[scoring.DEFAULT])}
    for name in ("one step, SGD rule", scoring.STANDARDISED, scoring.DEFAULT):
        better = torch.stack([scored[name][index].mean() for index in of_domain]) - scored[name].mean()
        shares[name] = (better.clamp(min=0) / better.clamp(min=0).sum()).float()
    shares = {name: (x.clamp(min=LEAST) / x.clamp(min=LEAST).sum()) for name, x in shares.items()}
    found = outcome(t, [drawn(x, len(t.batches), 0) for x in shares.values()])
    return {"rows": [{"way": n, "shares": x.tolist()} | o for (n, x), o in zip(shares.items(), found, strict=True)]}


def _stacked(batches: list[list[Tensor]]) -> Callable[[int], Tensor]:
    return lambda t: torch.stack([b[t - 1] for b in batches])


CANDIDATES = 2  # times what a step takes


def measure_steps(t: Task, seed: int) -> dict[str, Any]:
    """Half of each step's candidates, chosen before the optimizer moves, by ``adam_ghost.use``."""
    size = len(t.batches[0])
    generator = torch.Generator().manual_seed(seed)
    pools = [torch.randperm(len(t.bad), generator=generator)[: CANDIDATES * size] for _ in t.batches]
    rows = []
    for name, choose in STEP_WAYS.items():
        task = scoring.copied(t)
        optimizer, cache = task.optimizer(), ag.LayerCache(task.model, task.val_loss)
        for pool in pools:
            batch = t.take(pool)
            with cache:
                losses = task.losses(task.model(batch[0]), *batch[1:])
                losses.mean().backward()
            choose(cache, optimizer, losses.detach(), size, generator)
            optimizer.step()
            optimizer.zero_grad()
        rows.append({"way": name} | tested(task))
    return {"rows": rows}


def measure_steps_of(task: str, seed: int) -> dict[str, Any]:
    return measure_steps(TASKS[task](seed, RATES[task]), seed)


def tested(task: Task) -> dict[str, float]:
    """Loss and accuracy of the task's own model on the test samples."""
    with torch.no_grad():
        out = task.model(task.test[0])
        loss, right = task.losses(out, *task.test[1:]).mean(), (out.argmax(-1) == task.test[1]).double().mean()
    return {"loss": float(loss), "accuracy": float(right)}


def _only(rank: Callable[..., Tensor]) -> Callable[..., None]:
    """Has the step taken by the samples that ``rank`` gives the highest numbers."""

    def choose(cache: Any, optimizer: Any, losses: Tensor, size: int, generator: torch.Generator) -> None:
        best = rank(cache, optimizer, losses, generator).topk(size).indices
        weights = torch.zeros_like(losses).index_fill(0, best, len(losses) / size)
        use.reweigh(cache, optimizer, weights)

    return choose


def _select(**options: Any) -> Callable[..., Any]:
    return lambda cache, optimizer, losses, size, generator: use.select(cache, optimizer, **options)


STEP_WAYS: dict[str, Callable[..., Any]] = {
    RANDOM: _only(lambda cache, optimizer, losses, generator: torch.rand(len(losses), generator=generator)),
    "highest loss": _only(lambda cache, optimizer, losses, generator: losses),
    "lowest loss": _only(lambda cache, optimizer, losses, generator: -losses),
    "SGD rule": _only(lambda cache, optimizer, losses, generator: ag.attribute(cache, optimizer, rule="sgd", at="current")),
    "scores alone": _select(fraction=1 / CANDIDATES, redundancy=False),
    "scores and redundancy": _select(fraction=1 / CANDIDATES),
    "weighed by scores": _select(fraction=None),
}
