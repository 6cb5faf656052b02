"""Choosing within a step: the gradient of the samples that serve the validation loss, before the optimizer moves."""

from typing import NamedTuple

import torch
from torch import Tensor

from adam_ghost.attribution import attribute
from adam_ghost.layer_cache import LayerCache, check_cache, open_step
from adam_ghost.optim import Optimizers, OptState
from adam_ghost.pairwise import gram
from adam_ghost.step.step import Step, plain_precision


class Selection(NamedTuple):
    """What became of a step's samples."""

    weights: Tensor  # [n]: what each sample's share of the gradient was multiplied by; their mean is 1
    scores: Tensor  # [n]: by which they were chosen, in the validation loss's unit


def select(
    layer_cache: LayerCache,
    opt_state: Optimizers | OptState,
    fraction: float | None = 0.5,
    *,
    redundancy: bool = True,
) -> Selection:
    """Replaces ``.grad`` by the gradient of the chosen samples alone, as if the batch had been these; or weighs all samples.

        with cache:
            criterion(model(x), y).backward()
        use.select(cache, optimizer, 0.5)
        optimizer.step()

    Call it before gradients are clipped, so that what is clipped is the gradient of the chosen. Scores are those of ``attribute``
    with the validation gradient after the history's part of the step. With ``redundancy``, samples are chosen one by one for
    ``sum_S c s_i - sum_SS c^2 <D g_i, g_j> / 2``, where ``D`` is the optimizer's preconditioner (``gram``) and ``c`` the chosen's
    weight: of all sets that this can build up, the one whose gradient is nearest to the validation loss's, in the metric of the
    step. So of samples that pull alike not all are taken (after GREATS, NeurIPS 2024, which takes SGD's step for it).

    Args:
        layer_cache: what ``with layer_cache:`` recorded of the forward and backward pass of ``n`` samples, with a scalar
            ``val_loss``.
        opt_state: the optimizer about to step, a list of several, or its state.
        fraction: of the samples to choose, above 0 and at most 1, rounded, at least one. None: drop no quota of them, and
            weigh each by its score, those that harm by 0 (all by 1 where every sample harms).
        redundancy: whether, where samples are chosen, those that pull alike count less.

    Returns:
        The weights and the scores, on the device. ``.grad`` is ``sum_i weights_i g_i`` of the samples' shares ``g_i``, which for a
        mean loss is the gradient of the mean over the chosen; exact for every layer, with sums in at least float32.

    Raises:
        ValueError: ``fraction`` is out of its range, ``val_loss`` returns several losses, a gradient cannot be told apart by
            samples, several processes train the model; and as ``attribute``.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, or None for weights, got {fraction}")
    scores = attribute(layer_cache, opt_state, at="lookahead")
    if scores.ndim != 1:
        raise ValueError(f"val_loss must return one loss to choose by, got {scores.shape[1]}")
    if fraction is None:
        weights = weigh(scores)
    else:
        products = gram(layer_cache, opt_state) if redundancy else torch.zeros_like(scores).diag()
        weights = choose(scores, products, max(1, round(fraction * len(scores))))
    reweigh(layer_cache, opt_state, weights)
    return Selection(weights, scores)


def choose(scores: Tensor, products: Tensor, k: int) -> Tensor:
    """Weights ``[n]``, ``n / k`` for the chosen and 0 for the others: greedily for the sum that ``select`` names.

    Args:
        scores: ``[n]``: what each sample's share of the step takes off the validation loss.
        products: ``[n, n]``: the shares' products in the metric of the step, ``gram``'s.
        k: how many to choose, of 1 to ``n``.
    """
    n = len(scores)
    c = n / k
    weights = torch.zeros_like(scores)
    gains = c * scores - c * c / 2 * products.diagonal()
    for _ in range(k):
        best = gains.argmax(0, keepdim=True)  # [1]: no number that the host would wait for
        weights.index_fill_(0, best, c)
        gains = gains - c * c * products.index_select(0, best).squeeze(0)
        gains = gains.index_fill(0, best, -torch.inf)
    return weights


def weigh(scores: Tensor) -> Tensor:
    """Weights ``[n]`` of mean 1 in proportion to the scores, 0 for those below zero; all 1 where none is above."""
    helpful = scores.clamp(min=0)
    mean = helpful.mean()
    return torch.where(mean > 0, helpful / mean, 1.0)


def reweigh(layer_cache: LayerCache, opt_state: Optimizers | OptState, weights: Tensor) -> None:
    """Adds ``sum_i (weights_i - 1) g_i`` to ``.grad``, where ``g_i`` are the recorded samples' shares, which add up to it.

    What belongs to no sample, as the gradient of a penalty on the weights, stays.

    Args:
        layer_cache: what was recorded, with the final ``.grad`` in place.
        opt_state: the optimizer about to step.
        weights: ``[n]``; finite.

    Raises:
        ValueError: weights of another shape, a gradient that cannot be told apart by samples, several processes; and as
            ``attribute``. Nothing has changed then.
    """
    check_cache(layer_cache)
    if layer_cache.validation.world.size > 1:
        raise ValueError("the gradients of several processes are joined already: choose samples where one process trains the model")
    step = open_step(layer_cache, opt_state)
    if weights.shape != (step.samples,):
        raise ValueError(f"weights must be [{step.samples}], one per sample, got {list(weights.shape)}")
    if step.missing:
        raise ValueError(f"no recorded call explains the gradient of {', '.join(step.missing[:6])}, so it cannot be weighed")
    with plain_precision(layer_cache.model):
        made = {name: _weighed(step, name, weights - 1) for name in step.grads}
    for name, grad in step.grads.items():
        grad.copy_(made[name])


def _weighed(step: Step, name: str, change: Tensor) -> Tensor:
    """A parameter's gradient with ``change_i`` times each sample's share added; what belongs to no sample stays."""
    grad = step.grads[name]
    made = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True)
    for block, shares in step.sample_gradient_blocks(name):  # [n, rows, ...]
        made[block] += torch.tensordot(change.to(shares), shares, 1)
    return made
