"""Which feedback suits a training loss, and whether what it gives holds: told at the first step of each sweep that needs it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from adam_ghost.capture.declared import custom_function
from adam_ghost.run.feedback import FEEDBACKS, differences, is_exact, norm, small_step
from adam_ghost.run.rerun import KeptBatch, Rerun
from adam_ghost.step.coverage import Coverage

# nodes of a graph whose derivative jumps: a difference of gradients across a jump is the jump, divided by the small step
_KINKS = (
    *("Amax", "Amin", "Aminmax", "Clamp", "ClampMax", "ClampMin", "Fmax", "Fmin", "Kthvalue", "Max", "Maximum", "Median", "Min"),
    *("Minimum", "Nanmedian", "Topk", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "FractionalMaxPool2D", "FractionalMaxPool3D"),
    *("MaxPool2DWithIndices", "MaxPool3DWithIndices", "Abs", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu"),
    *("PreluKernel", "Relu", "RreluWithNoise", "Softshrink", "Threshold"),
)
# part of a gradient up to which it is rounding, and of a difference of gradients up to which it does not matter
_ROUNDING, _NOTHING = 1e-4, 0.05
# part of a product up to which another way has given the same: differences are off by as much where gradients bend strongly
_SAME = 0.2


class SuitedFeedback:
    """The feedback ``asked`` for, by name; of ``auto``, differences of gradients, or where the loss has kinks, double backward."""

    def __init__(self, rerun: Rerun, asked: str, coverage: Coverage, compiled: bool):
        self.rerun, self.asked, self.coverage, self.compiled = rerun, asked, coverage, compiled
        self._chosen = ""  # by the first call

    def __call__(self, step: int, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
        """``H vector`` of a step's batches, whose gradient the loop had as ``grads``, at its weights, which the model holds."""
        if self._chosen:
            return self._by(self._chosen, batches, grads, vector)
        self._chosen = "differences" if self.asked == "auto" else self.asked
        if self._chosen not in ("differences", "double", "forward"):
            return self._by(self._chosen, batches, grads, vector)
        # shards would be gathered once more for a look
        bent, custom = self._bends(batches) if not self.rerun.world.sharded else ([], [])
        why = ""
        if bent and self.asked == "auto" and not custom:
            try:
                product = self._by("double", batches, grads, vector)
                self._chosen = "double"
                return product
            except (RuntimeError, NotImplementedError) as error:
                why = f" ({str(error).splitlines()[0]})"
        product = self._by(self._chosen, batches, grads, vector)
        if bent and (self._chosen == "differences" or custom):
            ends = f"; second derivatives may end at custom functions ({', '.join(custom)})" if custom else why
            cure = "'gauss-newton'" if ends else "'double' or 'gauss-newton'"
            self.coverage.tell(
                "kinks",
                f"the training loss has kinks ({', '.join(bent)}), and differences of gradients jump across them{ends}: the credit"
                f" of windows by feedback={self._chosen!r} is not to be relied on; use {cure}, or smooth functions instead (GELU)",
            )
        elif not bent and self.rerun.world.size == 1 and is_exact(self.rerun, batches):
            self._hold(step, batches, grads, vector, product)
        return product

    def _by(self, name: str, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor]) -> list[Tensor]:
        # a compiled model's backward pass has no second derivative
        eager = torch.compiler.set_stance("force_eager") if self.compiled and name == "double" else nullcontext()
        with eager:
            return FEEDBACKS[name](self.rerun, batches, grads, vector)

    def _bends(self, batches: Sequence[KeptBatch]) -> tuple[list[str], list[str]]:
        """``bends`` of the training loss of the first batch, in any process."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with torch.enable_grad(), eager:
            found = [bends(self.rerun.loss(batch)) for batch in batches[:1]]
        bent, custom = (sorted({name for each in found for name in each[i]}) for i in range(2))
        everyone = self.rerun.world.gather((bent, custom))
        return sorted({name for each, _ in everyone for name in each}), sorted({name for _, each in everyone for name in each})

    def _hold(
        self, step: int, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], product: list[Tensor]
    ) -> None:
        """By two more gradients: whether the batches give the gradient that they gave, as exactly as a difference needs it, or
        whether derivatives of the gradient are what its differences are.
        """
        here = self.rerun.gradient(batches)
        own = differences(self.rerun, batches, here, vector)
        size, off = norm(own), norm([x - y for x, y in zip(product, own, strict=True)])
        if self._chosen == "differences":
            apart = norm([x - y for x, y in zip(here, grads, strict=True)]) / norm(grads)
            if bool((apart > _ROUNDING) & (off > _NOTHING * size)):
                raise ValueError(
                    f"step {step}: train_loss(inputs), run again at the step's weights, gives another gradient than the loop's"
                    f" backward pass ({float(apart):.1e} apart, which is {float(off / size):.0%} of the small difference of"
                    " gradients that feedback='differences' takes): it must return what the loop calls backward() on, up to a"
                    " factor, and draw random numbers from torch alone"
                )
            return
        # what rounding leaves of a gradient, which a difference has over its step
        noise = 8 * max(torch.finfo(g.dtype).eps for g in grads) * norm(grads)
        if bool(off > _SAME * size + noise / small_step(self.rerun, batches, vector)):
            self.coverage.tell(
                "feedback",
                f"feedback={self._chosen!r} is {float(off / size):.0%} away from a difference of two gradients: a part of the"
                " training loss is detached (targets or weights of the model's own making), which it takes for constant, or a"
                " second derivative is wrong; use feedback='differences'",
            )


def bends(loss: Tensor) -> tuple[list[str], list[str]]:
    """What the graph behind ``loss`` has of functions whose derivative jumps, by their nodes' names, and of custom functions."""
    bent: set[str] = set()
    custom: set[str] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().partition("Backward")[0]
        if name in _KINKS or (name == "Elu" and node._saved_alpha * node._saved_input_scale != 1):  # as SELU has it
            bent.add(name)
        if (function := custom_function(node)) is not None:
            custom.add(function.__name__)
        waiting += [parent for parent, _ in node.next_functions]
    return sorted(bent), sorted(custom)
