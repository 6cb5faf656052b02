"""The thin layer for hot loops: one step's scores from a LayerCache and an optimizer."""

from torch import Tensor

from adam_ghost.layer_cache import LayerCache, check_cache, open_step
from adam_ghost.optim import Optimizers, OptState, read_optimizer
from adam_ghost.step.direction import PLACES, find_direction
from adam_ghost.step.step import plain_precision


def attribute(
    layer_cache: LayerCache,
    opt_state: Optimizers | OptState,
    *,
    rule: str | None = None,
    at: str = "midpoint",
    per_token: bool = False,
) -> Tensor:
    """How much each sample of the recorded batch lowers the validation loss in the step about to be taken.

    Call it after the backward pass, with the final ``.grad`` in place, before ``optimizer.step()``. The scores are shares of
    the step: they add up to ``< P , g(B) >``, which is what the batch's gradient takes off the validation loss, against the
    step that momentum and weight decay would take without it, up to ``O(lr^3)``. Weights, gradients, optimizer state, module
    modes and random state are as before afterwards, to the bit. The recording stays for further calls until the cache is
    entered again. Gradients may be clipped or unscaled in between, as the optimizer will see them: the scores follow.

    Where several processes train the model, all of them call this together; each gets its own samples' scores.

    Args:
        layer_cache: what ``with layer_cache:`` recorded of the forward and backward pass of ``n`` samples.
        opt_state: the optimizer about to step, a list of several that share the parameters out, or its state.
        rule: how the optimizer's nonlinearity is linearized. None: exactly along the step (Adam's ``secant``). Others, for
            comparison: ``tangent`` (at its end), ``frozen`` (Adam's state before the step, arXiv 2602.00329), ``sgd`` (none, arXiv
            2406.11011).
        at: where the validation gradient is taken: ``midpoint`` of the step (second order), ``gauss`` (fourth order: the mean
            at two points, for twice the validation cost), ``lookahead`` (after the history's part of the step) or
            ``current`` weights.
        per_token: also resolve the tokens (dimension 1 of every layer's output).

    Returns:
        ``[n]``, ``[n, K]`` for ``K`` targets, ``[n, T]`` or ``[n, T, K]`` with ``per_token``; in the unit of the validation
        loss, positive = lowers it; at least float32, summed in that dtype, deterministic where the model is.

    Raises:
        TypeError: ``opt_state`` is no optimizer that is known, ``val_loss`` returns no tensor.
        ValueError: nothing was recorded, ``val_loss`` is missing, without a graph or not finite, a gradient is sparse or
            not finite or edited element by element, a parameter with a gradient is not the optimizer's, the weights changed
            since the recording, unknown ``rule`` or ``at``, no token dimension.
        RuntimeError: under ``strict``, if a parameter's gradient cannot be attributed, or the scores do not add up to the
            step's gradient (otherwise a warning, once).
    """
    opt_state = read_optimizer(opt_state)
    rule = opt_state.linearizations[0] if rule is None else rule
    for name, value, allowed in (("rule", rule, opt_state.linearizations), ("at", at, PLACES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    check_cache(layer_cache)
    validation = layer_cache.validation
    with validation.world.together(), plain_precision(layer_cache.model), validation.tree.steady():
        step = open_step(layer_cache, opt_state)
        direction = find_direction(step, validation, rule, at)
        scores = step.scores(direction.P, per_token)
        layer_cache.mark_weights()
        accounted = step.accounted(direction.P, direction.total)
        if accounted is not None and scores.device.type == "cpu":  # where looking costs no synchronisation
            joined = step.joined(scores, direction.val_loss)
            layer_cache.coverage.check(joined, accounted.numpy())
            layer_cache.coverage.check_alike(direction.val_loss.reshape(-1).numpy(), joined)
    return scores if direction.val_loss.ndim else scores.squeeze(-1)
