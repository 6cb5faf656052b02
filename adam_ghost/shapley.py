"""The exact game of one step, by sampled permutations: the yardstick that judges every estimate, and the audit."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adam_ghost.layer_cache import LayerCache, check_cache, open_step
from adam_ghost.optim import Optimizers, OptState
from adam_ghost.step.step import Step, plain_precision
from adam_ghost.step.validation import Validation


@dataclass(frozen=True)
class ShapleyValues:
    """Shapley values of one step's samples, in the unit of the validation loss, float64; ``[n]``, or ``[n, K]`` for K targets."""

    values: Tensor
    standard_error: Tensor  # of ``values``, over the sampled pairs of permutations
    leave_one_out: Tensor  # U(B) - U(B without i)
    total: Tensor  # U(B), what the values add up to exactly: [] or [K]
    evaluations: int  # of the validation loss

    def compare(self, scores: Tensor) -> tuple[float, float]:
        """Pearson's R and the relative L2 error of ``scores`` (same shape) against the values."""
        x, y = scores.double().flatten(), self.values.flatten()
        r = torch.corrcoef(torch.stack([x, y]))[0, 1] if x.numel() > 1 else torch.tensor(float("nan"))
        return float(r), float((x - y).norm() / y.norm())


def exact_shapley(
    layer_cache: LayerCache, opt_state: Optimizers | OptState, *, permutations: int = 8, seed: int = 0
) -> ShapleyValues:
    """Shapley values of the true step: Adam's whole nonlinearity and the true validation loss, nothing linearized.

    A sample's value is its mean marginal contribution over ``permutations`` random orders, each with its reverse (which
    makes second-order interactions exact). Costs ``2 * permutations * (n-1) + n + 2`` evaluations of the validation loss and
    holds all per-sample gradients, ``n`` times the model: for audits and small models. Weights and recording stay.

    Args:
        layer_cache: what ``with layer_cache:`` recorded, with the final ``.grad`` in place.
        opt_state: the optimizer about to step, or its state.
        permutations: random orders, at least 2 for a standard error.
        seed: of the orders.

    Raises:
        ValueError: ``permutations`` below 1; and as ``attribute``.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    check_cache(layer_cache)
    if layer_cache.validation.world.size > 1:
        raise ValueError("exact_shapley plays with a step's samples in one process, and this step's are spread over several")
    step = open_step(layer_cache, opt_state)
    with plain_precision(layer_cache.model):
        values = play(step, layer_cache.validation, permutations, seed)
    layer_cache.mark_weights()
    return values


def play(step: Step, validation: Validation, permutations: int, seed: int) -> ShapleyValues:
    """The sampled values of ``step``'s game, with the random numbers that the next validation gradient will draw."""
    game = _Game(step, validation)
    with validation.weights_kept(game.params):
        return _sample(game, permutations, torch.Generator().manual_seed(seed))


def _sample(game: "_Game", permutations: int, generator: torch.Generator) -> ShapleyValues:
    n = game.n
    everyone = game.utility(range(n))
    pairs = []
    for _ in range(permutations):
        order = torch.randperm(n, generator=generator).tolist()
        pairs.append((game.marginals(order, everyone) + game.marginals(order[::-1], everyone)) / 2)
    each = torch.stack(pairs)
    values = each.mean(0)
    error = each.std(0) / permutations**0.5 if permutations > 1 else torch.full_like(values, float("nan"))
    others = [[j for j in range(n) if j != i] for i in range(n)]
    alone = torch.stack([everyone - game.utility(rest) for rest in others])
    return ShapleyValues(values, error, alone, everyone, game.evaluations)


class _Game:
    """``U(S)`` of any subset of the samples: the validation loss that their share of the step takes off.

    Made while the weights are still those of the step's forward pass, of which the samples' shares are; played by moving them.
    """

    def __init__(self, step: Step, validation: Validation):
        self.step, self.validation, self.evaluations = step, validation, 0
        self.params = list(step.params.values())
        self.start = [p.detach().clone() for p in self.params]
        self.shares = [step.sample_gradients(name) for name in step.params]
        self.n = len(self.shares[0])

    @cached_property
    def empty(self) -> Tensor:
        """The loss where history alone takes the weights."""
        return self._loss([torch.zeros_like(s[0]) for s in self.shares])

    def _loss(self, grads: Sequence[Tensor]) -> Tensor:
        for p, w, g in zip(self.params, self.start, grads, strict=True):
            p.data.copy_(w)
            p.data.copy_(self.step.opt_state.weights(p, g))
        self.evaluations += 1
        return self.validation.loss().double()

    def utility(self, samples: Sequence[int]) -> Tensor:
        samples = list(samples)
        return self.empty - self._loss([s[samples].sum(0) for s in self.shares])

    def marginals(self, order: Sequence[int], everyone: Tensor) -> Tensor:
        """``[n]`` or ``[n, K]``: what each sample adds to those before it in ``order``."""
        sums = [torch.zeros_like(s[0]) for s in self.shares]
        marginals: list[Tensor] = [everyone] * len(order)
        before = torch.zeros_like(everyone)
        for i in order[:-1]:
            for total, share in zip(sums, self.shares, strict=True):
                total += share[i]
            after = self.empty - self._loss(sums)
            marginals[i] = after - before
            before = after
        marginals[order[-1]] = everyone - before
        return torch.stack(marginals)
