"""How faithful the scores are: every method against the exact Shapley values of the true step, on a small character GPT.

Computed in float64: the yardstick's differences of losses would drown in float32's rounding before the scores' errors show.
"""

from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.attribution import attribute
from adam_ghost.demo.model import GPT
from adam_ghost.layer_cache import LayerCache, open_step
from adam_ghost.shapley import exact_shapley
from adam_ghost.step.direction import form_direction, validation_gradient

METHODS = {
    "sgd at w": ("sgd", "current"),
    "paper (frozen at w)": ("frozen", "current"),
    "secant at w(empty)": ("secant", "lookahead"),
    "lookahead (predicted)": None,
    "secant at w_mid": ("secant", "midpoint"),
    "secant at two points": ("secant", "gauss"),
}
SETTINGS = [(batch, beta2, lr) for batch in (16, 64) for beta2, lr in ((0.999, 1e-3), (0.95, 3e-4))]
STEPS = (2, 10, 50, 200, 500)
CONTEXT = 64


def characters() -> Tensor:
    """The Python documentation, byte by byte."""
    return torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()))


def trained(
    batch: int, beta2: float, lr: float, steps: tuple[int, ...], device: str = "cpu"
) -> Iterator[tuple[int, LayerCache, torch.optim.Optimizer]]:
    """A training run that stops before each of ``steps``, recorded and ready to be scored."""
    torch.manual_seed(0)
    data = characters()
    model = GPT(256, CONTEXT, layers=2, width=64, heads=4).double().to(device)  # 120,576 parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2))
    held_out = len(data) * 9 // 10

    def draw(n: int, start: int, end: int) -> Tensor:
        return torch.stack([data[i : i + CONTEXT + 1] for i in torch.randint(start, end - CONTEXT - 1, (n,))]).to(device)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    x_val = draw(16, held_out, len(data))
    cache = LayerCache(model, lambda: loss(x_val))
    for step in range(1, max(steps) + 1):
        x = draw(batch, 0, held_out)
        if step in steps:
            with cache:
                loss(x).backward()
            yield step, cache, optimizer
            cache.clear()
        else:
            loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()


def audited_steps(
    batch: int, beta2: float, lr: float, steps: tuple[int, ...], permutations: int, device: str
) -> Iterator[dict[str, Any]]:
    """One row per audited step: R and relative L2 of every method, and the yardstick's own relative standard error."""
    for step, cache, optimizer in trained(batch, beta2, lr, steps, device):
        game = exact_shapley(cache, optimizer, permutations=permutations, seed=step)
        row = {"batch": batch, "beta2": beta2, "lr": lr, "step": step}
        row["yardstick_error"] = float(game.standard_error.norm() / game.values.norm())
        for name, how in METHODS.items():
            scores = attribute(cache, optimizer, rule=how[0], at=how[1]) if how else predicted(cache, optimizer)
            r, error = game.compare(scores)
            row[name] = {"r": r, "relative_l2": error}
        yield row


def predicted(cache: LayerCache, optimizer: torch.optim.Optimizer) -> Tensor:
    """The scores that InRun's lookahead gives: the scaling at the gradient that history lets expect."""
    step = open_step(cache, optimizer)
    expected = {name: step.opt_state.expected_gradient(p) for name, p in step.params.items()}
    val = validation_gradient(step.opt_state, step.params, expected, cache.validation, "lookahead")
    return step.scores(form_direction(step.opt_state, step.params, expected, val, "secant").P).squeeze(-1)


def measure(
    quick: bool = False, device: str = "cpu", report: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    rows = []
    for batch, beta2, lr in SETTINGS[:1] if quick else SETTINGS:
        for row in audited_steps(batch, beta2, lr, STEPS[:2] if quick else STEPS, 2 if quick else 8, device):
            rows.append(row)
            report(row)
    return rows


def shortfalls(rows: list[dict[str, Any]], method: str) -> list[str]:
    """Where ``method`` misses R >= 0.999 or relative L2 <= 0.02, from step 10 on."""
    found = []
    for row in rows:
        r, error = row[method]["r"], row[method]["relative_l2"]
        if row["step"] >= 10 and (r < 0.999 or error > 0.02):
            found.append(f"batch {row['batch']}, beta2 {row['beta2']}, step {row['step']}: {r:.4f} / {error:.3f}")
    return found
