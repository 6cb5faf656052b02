"""Credit over windows against truth: leaving samples out and training on, and training on random halves of the data."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import adam_ghost as ag
from bench.tasks import TASKS, Task

HALVES = 40  # trainings on random halves, for the linear datamodeling score
LEFT_OUT = 16  # samples left out of a step


def correlation(a: Tensor, b: Tensor, ranks: bool = False) -> float:
    """Pearson's, or Spearman's."""
    if ranks:
        a, b = (x.argsort().argsort().double() for x in (a, b))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def train_on(task: Task, run: Callable[[torch.optim.Optimizer], Any], each: Callable[..., None] | None = None) -> Any:
    """The task's own training by a copy of its model, under what ``run`` attaches; returns what that was."""
    task = copy.copy(task)
    task.model = copy.deepcopy(task.model)
    optimizer = task.optimizer()
    attached = run(task, optimizer)
    for step, index in enumerate(task.batches, 1):
        batch = task.take(index)
        if isinstance(attached, ag.InRun):
            attached.batch([f"{step}.{i}" for i in index.tolist()] if each else index.tolist(), inputs=batch)
            task.loss(batch).backward()
        else:
            attached(step, index, batch)
        optimizer.step()
        optimizer.zero_grad()
    return attached


def windows(task: Task, window: int, ahead: int, feedback: str = "differences") -> Tensor:
    """``[N]``: total credit of every sample."""
    run = train_on(
        task,
        lambda t, optimizer: ag.InRun(
            t.model, optimizer, t.val_loss, "window", window=window, ahead=ahead, train_loss=t.loss, feedback=feedback
        ),
    )
    run.close()
    return by_sample(task, run)


def by_sample(task: Task, run: ag.InRun) -> Tensor:
    found = run.scores()
    total = torch.zeros(len(task.bad), dtype=torch.float64)
    total[torch.tensor(found.ids)] = torch.from_numpy(found.total)
    return total


def one_step_rules(task: Task) -> dict[str, Tensor]:
    """``[N]`` per rule: totals of one-step scores, and minus the summed training loss."""
    rules = {"sgd": ("sgd", "current"), "paper": ("frozen", "current"), "midpoint": ("secant", "midpoint")}
    names = [*rules, "midpoint, standardised", "midpoint, from step 11", "summed loss"]
    found = {name: torch.zeros(len(task.bad), dtype=torch.float64) for name in names}

    def run(t: Task, optimizer: torch.optim.Optimizer) -> Callable[..., None]:
        cache = ag.LayerCache(t.model, t.val_loss)

        def step(number: int, index: Tensor, batch: tuple[Tensor, ...]) -> None:
            with cache:
                losses = t.losses(t.model(batch[0]), *batch[1:])
                losses.mean().backward()
            for name, (rule, at) in rules.items():
                found[name][index] += ag.attribute(cache, optimizer, rule=rule, at=at)
            scores = ag.attribute(cache, optimizer)
            found["midpoint, standardised"][index] += (scores - scores.mean()) / scores.std()
            found["midpoint, from step 11"][index] += scores * (number > 10)
            found["summed loss"][index] -= losses.detach()

        return step

    train_on(task, run)
    return found


def leave_one_out(task: Task, at: list[int], K: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Per step of ``at``: the samples' credit to step ``step + K - 1``, and what leaving each out really does, ``[16]``."""
    scores: dict[int, Tensor] = {}
    every = at[1] - at[0]

    def run(t: Task, optimizer: torch.optim.Optimizer) -> ag.InRun:
        options = {"window": 1, "ahead": K - 1, "every": every, "train_loss": t.loss}
        return ag.InRun(t.model, optimizer, t.val_loss, "window", **options)

    attached = train_on(task, run, each=lambda: None)
    attached.close()
    found = attached.scores()
    credit = dict(zip(found.ids, found.total, strict=True))
    everyone = lambda M: lambda t: torch.ones(M, len(task.batches[t - 1]), dtype=torch.float64)  # noqa: E731
    before, done = task.start(1), 0
    result = {}
    for step in at:
        before, done = task.train(before, done + 1, step - 1, everyone(1)), step - 1
        index = task.batches[step - 1]
        M = min(LEFT_OUT, len(index)) + 1  # the last one keeps everybody

        def weight(t: int, step: int = step, M: int = M) -> Tensor:
            kept = torch.ones(M, len(task.batches[t - 1]), dtype=torch.float64)
            if t == step:
                kept[range(M - 1), range(M - 1)] = 0
            return kept

        start = type(before)(*({k: x.expand(M, *x.shape[1:]) for k, x in part.items()} for part in before))
        losses = task.outcomes(task.train(start, step, step + K - 1, weight))
        truth = losses[:-1] - losses[-1]
        scores[step] = torch.tensor([credit[f"{step}.{i}"] for i in index[: M - 1].tolist()])
        result[step] = (scores[step], truth)
    return result


def halves(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """``[M, N]`` which samples were kept, and ``[M]`` minus the validation loss of really training on them."""
    keep = torch.rand(HALVES, len(task.bad), generator=torch.Generator().manual_seed(seed)) < 0.5
    states = task.train(task.start(HALVES), 1, len(task.batches), lambda t: keep[:, task.batches[t - 1]].double())
    return keep, -task.outcomes(states)


def auroc(task: Task, total: Tensor) -> float:
    """How well low totals tell the bad samples."""
    return float((total[~task.bad][:, None] > total[task.bad][None]).double().mean())


# what is compared on whole runs: window, steps ahead, feedback
WINDOWS = {
    "windows of 10": (10, 0, "differences"),
    "windows of 32": (32, 0, "differences"),
    "windows of 32, 32 ahead (the default)": (32, 32, "differences"),
    "windows of 40, 40 ahead": (40, 40, "differences"),
    "the default, Gauss-Newton": (32, 32, "gauss-newton"),
    "the default, no feedback": (32, 32, "none"),
    "the whole run": (10**6, 0, "differences"),
}
# the whole runs: task and learning rate
RUNS = {"digits, lr 1e-3": ("digits", 1e-3), "texts, lr 3e-4": ("texts", 3e-4)}
# learning rate, beta2
SETTINGS = [(1e-3, 0.999), (3e-3, 0.999), (1e-2, 0.999), (3e-4, 0.95), (1e-2, 0.95)]
HORIZONS = (1, 10, 30)
STEPS = [41, 81, 121]  # past the first, in which the step is the gradient's sign and no linearization is exact


def measure_run(name: str, seed: int, windows_of: list[str]) -> dict[str, Any]:
    """LDS and AUROC of every way to score, on one of ``RUNS`` with one seed."""
    torch.set_num_threads(1)
    task_name, lr = RUNS[name]
    task = TASKS[task_name](seed, lr)
    keep, outcomes = halves(task, seed)
    totals = one_step_rules(task)
    for label in windows_of:
        window, ahead, feedback = WINDOWS[label]
        totals[label] = windows(task, min(window, len(task.batches)), ahead, feedback)
    rows = {}
    for label, total in totals.items():
        predicted = keep.double() @ total
        rows[label] = {"lds": correlation(predicted, outcomes, ranks=True), "auroc": auroc(task, total)}
    return {"run": name, "seed": seed, "rows": rows}


def measure_horizons(name: str, seed: int, lr: float, beta2: float) -> dict[str, Any]:
    """R of credit with leaving one sample out and training on for K steps, per K, the worst and the mean of the steps."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"task": name, "seed": seed, "lr": lr, "beta2": beta2}
    for K in HORIZONS:
        pairs = leave_one_out(TASKS[name](seed, lr, beta2), STEPS, K).values()
        found[f"K={K}"] = [correlation(*pair) for pair in pairs]
    return found
