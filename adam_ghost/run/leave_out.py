"""The truth that windows are audited with: a sample is left out of a step, and training goes on without it from the kept state."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adam_ghost.ledger.books import Audit
from adam_ghost.optim import OptState
from adam_ghost.run.small_step import norm

if TYPE_CHECKING:
    from adam_ghost.run.sweep import KeptStep, Sweep


class Trajectory:
    """The steps of a sweep from one on, taken again with one sample's share missing from the first."""

    def __init__(self, sweep: "Sweep", state: OptState, step: "KeptStep"):
        self.sweep, self.state, self.step = sweep, state, step
        self.later = [s for s in sweep.steps if s.number > step.number]

    def choose(self, samples: int) -> list[int]:
        """Evenly spaced samples of the step, as places in its scores."""
        n = sum(len(batch.ids) for batch in self.step.batches)
        return sorted({round(i * (n - 1) / max(1, samples - 1)) for i in range(min(samples, n))})

    def without(self, sample: int, raw: list[Tensor]) -> Tensor:
        """The validation loss at the window's end, ``[]`` or ``[K]``, float64."""
        self.sweep.put(self.state)
        share = self._share(sample)
        state = self._next(self.state, self.step, [g - x for g, x in zip(raw, share, strict=True)], self.later)
        for i, step in enumerate(self.later):
            self.sweep.put(state)
            state = self._next(state, step, self.sweep.rerun.gradient(step.batches), self.later[i + 1 :])
        self.sweep.put(state)
        return self.sweep.loop.validation.loss().double()

    def _next(self, state: OptState, step: "KeptStep", raw: list[Tensor], later: list["KeptStep"]) -> OptState:
        """The state after ``step`` with another gradient, clipped as the loop clips."""
        factor, limit = step.factor.double(), self.sweep.max_norm
        used = step.grads.get()
        if limit is not None:
            factor = self.sweep.unclipped.double() if step.number in self.sweep.clipped else factor
            factor = torch.minimum(factor, limit / norm(raw))
        grads = [None if old is None else g * factor.to(g.dtype) for g, old in zip(raw, used, strict=True)]
        return state.advanced(grads, later[0].scalars if later else step.scalars)

    def _share(self, sample: int) -> list[Tensor]:
        """One sample's share of the step's gradient, by the model's output: no recorded call is asked."""
        rerun = self.sweep.rerun
        for batch in self.step.batches:
            if sample < len(batch.ids):
                break
            sample -= len(batch.ids)
        batch.only_output("audit_every")
        with torch.enable_grad():
            loss, out = rerun.loss_and_output(batch)
            (slope,) = torch.autograd.grad(loss, out, retain_graph=True)
            if out.ndim < 1 or len(out) != len(batch.ids):
                raise ValueError(
                    f"audit_every needs a model whose output has the batch as its first dimension, got shape {list(out.shape)} for"
                    f" {len(batch.ids)} samples"
                )
            alone = torch.zeros_like(slope)
            alone[sample] = slope[sample]
            found = torch.autograd.grad(out, rerun.params, alone, allow_unused=True)
        scale = torch.ones(()) if batch.scale is None else batch.scale
        return [torch.zeros_like(p) if g is None else g * scale.to(g.dtype) for p, g in zip(rerun.params, found, strict=True)]


def compare(scores: Tensor, truth: Tensor) -> Audit:
    """Scores ``[m, K]`` against what leaving the samples out did."""
    x, y = scores.flatten(), truth.flatten()
    r = float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if len(x) > 1 else float("nan")
    return Audit(r, float((x - y).norm() / y.norm()), [])
