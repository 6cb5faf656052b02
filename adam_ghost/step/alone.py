"""An audit's look at what the exact game cannot see: whether the recorded gradients of a few samples are really theirs.

The model's pass is run again, and the gradient that came back at its outputs is sent through it for one sample alone. That is
the sample's gradient if the model keeps samples apart, whatever became of the batch on its way; where the batch was followed
wrongly, or samples are mixed, the recorded one is another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adam_ghost.scores.forms import Asked
from adam_ghost.scores.shapes import samples_of
from adam_ghost.step.step import Step
from adam_ghost.step.validation import Validation
from adam_ghost.step.whole_pass import WholePass

# relative difference of a sample's gradients, beyond that of their dtype: more is another gradient, not rounding
DIFFERENT = 0.02


def alone(step: Step, whole: WholePass, asked: Asked, validation: Validation, seed: int) -> float | None:
    """The largest relative difference between recorded gradients and those of samples alone, for two of the first recording's.

    ``asked``: of that recording. None where it cannot be told: outputs without the batch along dimension 0, or tokens after it
    where samples are packed in rows, or a pass that does not repeat itself.
    """
    if any(g.ndim == 0 for g in whole.grads.values()) or not whole.by_sample(asked.n, asked.packing):
        return None
    n, of = asked.samples, {k: samples_of(g, (0, 1), asked) for k, g in whole.grads.items()}
    covered = {name for r in step.recordings for name in r.covered()}
    params = {name: p for name, p in step.params.items() if name in covered}
    picks = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:2].tolist()
    with validation.undisturbed(advance=False), torch.enable_grad():
        outputs = whole.again()
        if outputs is None:
            return None
        try:
            found = [_gradients(outputs, whole.grads, params.values(), of, i) for i in picks]
        except RuntimeError:  # a pass that cannot be differentiated this way, as through reentrant checkpoints
            return None
    off, size = torch.zeros(2, len(picks), dtype=torch.float64)
    for k, name in enumerate(params):
        recorded = step.sample_gradients(name)[picks].flatten(1).double()
        factor = 1.0 if not step.scale else step.scale[name].double()
        theirs = torch.stack([g[k].flatten() for g in found]).double() * factor
        off += (recorded - theirs).square().sum(1).cpu()
        size += theirs.square().sum(1).cpu()
    return float((off / size.clamp(min=torch.finfo(torch.float64).tiny)).sqrt().max())


def tolerance(whole: WholePass) -> float:
    """The difference up to which gradients are the same, in the precision of the pass."""
    return DIFFERENT + 16 * max(torch.finfo(g.dtype).eps for g in whole.grads.values())


def _gradients(outputs: Sequence[Tensor], grads: dict[int, Tensor], params: Any, of: dict[int, Tensor], i: int) -> list[Tensor]:
    """By each of ``params``, with sample ``i``'s share of the gradient at the outputs, whose elements' samples are ``of``."""
    params, shares = list(params), [torch.where(of[k] == i, grad, 0.0) for k, grad in grads.items()]
    found = torch.autograd.grad([outputs[k] for k in grads], params, shares, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
