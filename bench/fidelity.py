"""How faithful the scores are: every method against the exact Shapley values of the true step, on a small character GPT.

Computed in float64: the yardstick's differences of losses would drown in float32's rounding before the scores' errors show.
"""

from collections.abc import Callable, Iterator, Mapping
from pydoc_data.topics import topics
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.attribution import attribute
from adam_ghost.demo.model import GPT
from adam_ghost.layer_cache import LayerCache, open_step
from adam_ghost.optim import Optimizers, read_optimizer
from adam_ghost.shapley import ShapleyValues, exact_shapley, play
from adam_ghost.step.direction import form_direction, validation_gradient
from adam_ghost.step.validation import Validation
from bench import optimizers as others
from bench.optimizers import OPTIMIZERS, Make, cost, slowed, window_r

METHODS = {
    "sgd at w": ("sgd", "current"),
    "paper (frozen at w)": ("frozen", "current"),
    "secant at w(empty)": ("secant", "lookahead"),
    "lookahead (predicted)": None,
    "secant at w_mid": ("secant", "midpoint"),
    "secant at two points": ("secant", "gauss"),
}
# of any optimizer, by its own exact rule
OWN_METHODS = {
    "sgd at w": ("sgd", "current"),
    "own at w(empty)": (None, "lookahead"),
    "lookahead (predicted)": None,
    "midpoint": (None, "midpoint"),
    "gauss": (None, "gauss"),
}
OTHER_STEPS = (10, 30)
# permutations of the yardstick, and of one whose relative standard error with few is more than enough
FEW, MANY, ENOUGH = 4, 24, 0.005
SETTINGS = [(batch, beta2, lr) for batch in (16, 64) for beta2, lr in ((0.999, 1e-3), (0.95, 3e-4))]
STEPS = (2, 10, 50, 200, 500)
CONTEXT = 64


def characters() -> Tensor:
    """The Python documentation, byte by byte."""
    return torch.tensor(list("".join(topics[name] for name in sorted(topics)).encode()))


class Training:
    """A character GPT of 120,576 parameters on the Python documentation."""

    def __init__(self, make: Make, batch: int, device: str = "cpu"):
        torch.manual_seed(0)
        self.data, self.batch, self.device = characters(), batch, device
        self.model = GPT(256, CONTEXT, layers=2, width=64, heads=4).double().to(device)
        self.optimizers = make(self.model)
        self.held_out = len(self.data) * 9 // 10
        self.x_val = self._texts(16, self.held_out, len(self.data))

    def _texts(self, n: int, start: int, end: int) -> Tensor:
        places = torch.randint(start, end - CONTEXT - 1, (n,))
        return torch.stack([self.data[i : i + CONTEXT + 1] for i in places]).to(self.device)

    def draw(self) -> Tensor:
        return self._texts(self.batch, 0, self.held_out)

    def loss(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Of texts ``[n, CONTEXT + 1]``, the mean; with ``weights`` ``[n]`` each sample's part of it counts as much."""
        if weights is None:
            return F.cross_entropy(self.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        each = F.cross_entropy(self.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten(), reduction="none")
        return (each.view(len(x), -1).mean(1) * weights).sum() / len(x)

    def step(self, x: Tensor, weights: Tensor | None = None) -> None:
        self.loss(x, weights).backward()
        for each in self.optimizers:
            each.step()
            each.zero_grad()

    def val_loss(self) -> Tensor:
        return self.loss(self.x_val)

    def stops(self, steps: tuple[int, ...]) -> Iterator[tuple[int, LayerCache]]:
        """Trains, and stops before each of ``steps``, recorded and ready to be scored."""
        cache = LayerCache(self.model, self.val_loss)
        for step in range(1, max(steps) + 1):
            x = self.draw()
            if step in steps:
                with cache:
                    self.loss(x).backward()
                yield step, cache
                cache.clear()
                for each in self.optimizers:
                    each.step()
                    each.zero_grad()
            else:
                self.step(x)


def trained(
    batch: int, beta2: float, lr: float, steps: tuple[int, ...], device: str = "cpu"
) -> Iterator[tuple[int, LayerCache, torch.optim.Optimizer]]:
    """A training run by AdamW that stops before each of ``steps``, recorded and ready to be scored."""
    training = Training(lambda model: [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2))], batch, device)
    for step, cache in training.stops(steps):
        yield step, cache, training.optimizers[0]


def audited_steps(
    batch: int, beta2: float, lr: float, steps: tuple[int, ...], permutations: int, device: str
) -> Iterator[dict[str, Any]]:
    """One row per audited step: R and relative L2 of every method, and the yardstick's own relative standard error."""
    for step, cache, optimizer in trained(batch, beta2, lr, steps, device):
        game = exact_shapley(cache, optimizer, permutations=permutations, seed=step)
        yield {"batch": batch, "beta2": beta2, "lr": lr, "step": step} | _compared(METHODS, game, cache, optimizer)


def _compared(methods: Mapping[str, Any], game: ShapleyValues, cache: LayerCache, optimizers: Optimizers) -> dict[str, Any]:
    row: dict[str, Any] = {"yardstick_error": yardstick_error(game)}
    for name, how in methods.items():
        scores = attribute(cache, optimizers, rule=how[0], at=how[1]) if how else predicted(cache, optimizers)
        r, error = game.compare(scores)
        row[name] = {"r": r, "relative_l2": error}
    return row


def yardstick_error(game: ShapleyValues) -> float:
    return float(game.standard_error.norm() / game.values.norm())


def predicted(cache: LayerCache, optimizers: Optimizers) -> Tensor:
    """The scores that InRun's lookahead gives: the scaling at the gradient that history lets expect."""
    step = open_step(cache, optimizers)
    expected = {name: step.opt_state.expected_gradient(p) for name, p in step.params.items()}
    val = validation_gradient(step.opt_state, step.params, expected, cache.validation, "lookahead")
    rule = step.opt_state.linearizations[0]
    return step.scores(form_direction(step.opt_state, step.params, expected, val, rule).P).squeeze(-1)


class _Linear:
    """A validation loss that is its gradient times the weights."""

    def __init__(self, grads: Mapping[str, Tensor], params: Mapping[str, Tensor], validation: Validation):
        self.terms = [(grads[name].squeeze(0).clone(), p) for name, p in params.items()]
        self.weights_kept = validation.weights_kept

    def loss(self) -> Tensor:
        return torch.stack([(g * p.detach()).sum() for g, p in self.terms]).sum()


def step_alone(cache: LayerCache, optimizers: Optimizers, seed: int, permutations: int) -> dict[str, float]:
    """The scores at the midpoint against the values of the step's game where the loss is its gradient there: what is left is
    what many samples at once do to the step, beyond a path from none to all of them."""
    scores = attribute(cache, optimizers, at="midpoint")
    step = open_step(cache, optimizers)
    grads = {name: p.grad for name, p in step.params.items()}
    val = validation_gradient(step.opt_state, step.params, grads, cache.validation, "midpoint")
    linear = cast(Validation, _Linear(val.grads, step.params, cache.validation))
    game = play(step, linear, permutations, seed)
    r, error = game.compare(scores)
    return {"r": r, "relative_l2": error, "own": yardstick_error(game)}


def cost_of(name: str) -> dict[str, float | None]:
    """What the rule of the named optimizer costs beside AdamW's."""
    return cost(OPTIMIZERS[name], GPT(256, CONTEXT, layers=2, width=256, heads=4))


def other_optimizer(name: str, quick: bool = False) -> dict[str, Any]:
    """A training by the named optimizer: rows as of AdamW's, what its rule costs beside AdamW's, and R of a window's credit."""
    make = OPTIMIZERS[name]
    training = Training(make, 16)
    rows = []
    for step, cache in training.stops((10,) if quick else OTHER_STEPS):
        permutations = 2 if quick else FEW
        game = exact_shapley(cache, training.optimizers, permutations=permutations, seed=step)
        if not quick and yardstick_error(game) > ENOUGH:
            permutations = MANY
            game = exact_shapley(cache, training.optimizers, permutations=permutations, seed=step)
        foreseen = read_optimizer(training.optimizers).not_foreseen is None
        methods = {k: v for k, v in OWN_METHODS.items() if foreseen or not k.startswith("lookahead")}
        rows.append({"optimizer": name, "step": step} | _compared(methods, game, cache, training.optimizers))
        rows[-1]["permutations"] = permutations
        if others.misses(rows[-1]):
            rows[-1]["step_alone"] = step_alone(cache, training.optimizers, step, 4 * MANY)
            rows[-1]["step_alone_64"] = next(
                step_alone(wide, larger.optimizers, at, MANY)
                for larger in [Training(make, 64)]
                for at, wide in larger.stops((step,))
            )
    windows = window_r(training)
    missed = tuple(row["step"] for row in rows if others.misses(row))
    if missed or (windows["window_r"] or 1.0) < 0.98:
        slow = Training(slowed(make, 0.1), 16)
        for step, cache in slow.stops((10,) if quick else OTHER_STEPS):
            if step in missed:
                game = exact_shapley(cache, slow.optimizers, permutations=MANY, seed=step)
                row = next(row for row in rows if row["step"] == step)
                r, error = game.compare(attribute(cache, slow.optimizers, at="gauss"))
                row["slowed"] = {"r": r, "relative_l2": error, "own": yardstick_error(game)}
        windows["slowed_window_r"] = window_r(slow)["window_r"]
    rules = " and ".join(dict.fromkeys(read_optimizer(each).linearizations[0] for each in training.optimizers))
    return {"optimizer": name, "rule": rules, "rows": rows, **windows, **cost_of(name)}


def measure(
    quick: bool = False, device: str = "cpu", report: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    rows = []
    for batch, beta2, lr in SETTINGS[:1] if quick else SETTINGS:
        for row in audited_steps(batch, beta2, lr, STEPS[:2] if quick else STEPS, 2 if quick else 8, device):
            rows.append(row)
            report(row)
    return rows


def misses(row: dict[str, Any], method: str) -> bool:
    """Whether ``method`` misses R >= 0.999 or relative L2 <= 0.02, from step 10 on."""
    return row["step"] >= 10 and (row[method]["r"] < 0.999 or row[method]["relative_l2"] > 0.02)


def shortfalls(rows: list[dict[str, Any]], method: str) -> list[str]:
    """Where ``method`` misses that, in words."""
    found = []
    for row in rows:
        r, error = row[method]["r"], row[method]["relative_l2"]
        if misses(row, method):
            found.append(f"batch {row['batch']}, beta2 {row['beta2']}, step {row['step']}: {r:.4f} / {error:.3f}")
    return found
