"""Which feedback suits a training loss, and whether what it gives holds: told at the first step of each sweep that needs it."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adam_ghost.capture.declared import custom_function
from adam_ghost.run.compiled import is_compiled
from adam_ghost.run.feedback import FEEDBACKS, differences
from adam_ghost.run.rerun import KeptBatch, Rerun
from adam_ghost.run.small_step import SmallSteps, is_exact, is_half, moved, norm
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
# part of a product up to which another way has given the same, and how many times as far the other difference goes
_SAME, _WIDER = 0.2, 32
# parts of what products with a vector would be up to which they are those of a symmetric matrix, and a difference's own error
_SYMMETRIC, _BENT = 0.1, 5e-3


class Given(NamedTuple):
    """What a product is of."""

    batches: Sequence[KeptBatch]
    grads: list[Tensor]
    vector: list[Tensor]
    steps: SmallSteps


class SuitedFeedback:
    """The feedback ``asked`` for, by name; of ``auto``, differences of gradients, or where they do not hold, double backward."""

    def __init__(self, rerun: Rerun, asked: str, coverage: Coverage):
        self.rerun, self.asked, self.coverage = rerun, asked, coverage
        self._chosen = ""  # by the first call
        self._sweeps = 0
        self._steps: list[SmallSteps] = []  # by target

    def begin(self) -> None:
        """Another sweep; which feedback suits is looked at in the first, and ever more rarely: the second, fourth, eighth, ..."""
        self._sweeps += 1
        if self._sweeps & (self._sweeps - 1) == 0:
            self._chosen = ""
        for steps in self._steps:
            steps.begin()

    def __call__(
        self, step: int, batches: Sequence[KeptBatch], grads: list[Tensor], vector: list[Tensor], k: int = 0
    ) -> list[Tensor]:
        """``H vector`` of a step's batches, whose gradient the loop had as ``grads``, at its weights, which the model holds.

        ``k``: the target that the vector is of.
        """
        if k == len(self._steps):
            self._steps.append(SmallSteps(self.rerun))
        given = Given(batches, grads, vector, self._steps[k])
        return self._by(self._chosen, given) if self._chosen else self._choose(step, given)

    def _choose(self, step: int, given: Given) -> list[Tensor]:
        self._chosen = "differences" if self.asked == "auto" else self.asked
        if self._chosen not in ("differences", "double", "forward"):
            return self._by(self._chosen, given)
        # shards would be gathered once more for a look
        bent, custom = self._bends(given.batches) if not self.rerun.world.sharded else ([], [])
        product, why = None, ""
        if (bent or is_half(self.rerun)) and not custom:
            product, why = self._rather_double(given)
        if product is not None:
            return product
        product = self._by(self._chosen, given)
        if bent and (self._chosen == "differences" or custom):
            self._tell_of_kinks(f" ({', '.join(bent)})", custom, why)
        elif is_half(self.rerun) and self._chosen == "differences":
            self.coverage.tell(
                "half",
                "weights of half precision move by a small step as rounding has it, if at all: the credit of windows by"
                " feedback='differences' is off by tenths of its size; use 'double' where a process has them whole, or keep weights"
                " in float32, under autocast or a mixed-precision policy",
            )
        elif not bent and self.rerun.world.size == 1 and is_exact(self.rerun, given.batches):
            product = self._held(step, given, product, custom)
        return product

    def _tell_of_kinks(self, which: str, custom: list[str], why: str) -> None:
        ends = f"; second derivatives may end at custom functions ({', '.join(custom)})" if custom else why
        cure = "'gauss-newton'" if ends else "'double' or 'gauss-newton'"
        self.coverage.tell(
            "kinks",
            f"the training loss has kinks{which}, and differences of gradients jump across them{ends}: the credit of windows by"
            f" feedback={self._chosen!r} is not to be relied on; use {cure}, or smooth functions instead (GELU)",
        )

    def _by(self, name: str, given: Given) -> list[Tensor]:
        # a compiled model's backward pass has no second derivative
        compiled = name == "double" and is_compiled(self.rerun.model)
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return FEEDBACKS[name](self.rerun, *given)

    def _rather_double(self, given: Given) -> tuple[list[Tensor] | None, str]:
        """The product by double backward, which is from now on chosen, if that is left to us; or why there is none."""
        if self.asked != "auto" or self.rerun.world.sharded:  # where gradients come to .grad alone
            return None, ""
        try:
            product = self._by("double", given)
        except (RuntimeError, NotImplementedError) as error:
            return None, f" ({str(error).splitlines()[0]})"
        self._chosen = "double"
        return product, ""

    def _bends(self, batches: Sequence[KeptBatch]) -> tuple[list[str], list[str]]:
        """``bends`` of the training loss of the first batch, in any process."""
        eager = torch.compiler.set_stance("force_eager") if is_compiled(self.rerun.model) else nullcontext()
        with torch.enable_grad(), eager:
            found = [bends(self.rerun.loss(batch)) for batch in batches[:1]]
        bent, custom = (sorted({name for each in found for name in each[i]}) for i in range(2))
        everyone = self.rerun.world.gather((bent, custom))
        return sorted({name for each, _ in everyone for name in each}), sorted({name for _, each in everyone for name in each})

    def _held(self, step: int, given: Given, product: list[Tensor], custom: list[str]) -> list[Tensor]:
        """The product, held against a few more gradients, or another where it does not hold."""
        here = self.rerun.gradient(given.batches)
        if self._chosen == "differences":
            c = given.steps.last
            if not bool(c != 0):
                return product
            self._check_same(step, given, here, product)
            far = (_WIDER * c).clamp(-given.steps.most, given.steps.most)
            with moved(self.rerun, given.vector, far):
                wide = self.rerun.gradient(given.batches)
            torch._foreach_sub_(wide, here)
            torch._foreach_mul_(wide, [(1 / far).to(x.dtype) for x in wide])
            if self._differ(wide, product, given, c):  # a smooth function's differ by a few hundredths
                better, why = (None, "") if custom else self._rather_double(given)
                if better is None:
                    self._tell_of_kinks("", custom, why)
                return product if better is None else better
            again = differences(self.rerun, given.batches, here, product, SmallSteps(self.rerun))
            if not self._symmetric(given, product, again):
                self.coverage.tell(
                    "feedback",
                    "the training loss' gradient is no function's (it was reversed, or passed straight through), and its derivative"
                    " not symmetric: the credit of windows, whose feedback takes it for that, is not to be relied on",
                )
            return product
        # whether derivatives of the gradient are what its differences are
        steps = SmallSteps(self.rerun)
        own = differences(self.rerun, given.batches, here, given.vector, steps)
        if off := self._differ(product, own, given, steps.last):
            self.coverage.tell(
                "feedback",
                f"feedback={self._chosen!r} is {off:.0%} away from a difference of two gradients: a part of the training loss is"
                " detached (targets or weights of the model's own making), which it takes for constant, or a second derivative is"
                " wrong; use feedback='differences'",
            )
        return product

    @staticmethod
    def _symmetric(given: Given, product: list[Tensor], again: list[Tensor]) -> bool:
        """Whether ``< v , H (H v) >`` is ``|H v|^2``, as it is where the gradient is a function's; up to a difference's error."""
        along = torch.stack([(x * y).sum().double() for x, y in zip(given.vector, again, strict=True)]).sum()
        squared = norm(product).square()
        return bool((along - squared).abs() <= _SYMMETRIC * squared + _BENT * norm(given.vector) * norm(again))

    @staticmethod
    def _differ(x: list[Tensor], y: list[Tensor], given: Given, c: Tensor) -> float:
        """How far a product is from another, as a part of it; 0 where rounding and bends of a difference by ``c`` explain it."""
        size, off = norm(y), norm([a - b for a, b in zip(x, y, strict=True)])
        noise = 8 * max(torch.finfo(g.dtype).eps for g in given.grads) * norm(given.grads) / c.abs()
        return float(off / size) if bool(off > _SAME * size + noise) else 0.0

    def _check_same(self, step: int, given: Given, here: list[Tensor], product: list[Tensor]) -> None:
        """Raises ValueError where the batches do not give the gradient that they gave as exactly as a difference needs it."""
        apart = torch._foreach_sub(here, given.grads)
        size = norm([x - y / given.steps.last.to(y.dtype) for x, y in zip(product, apart, strict=True)])
        part, off = norm(apart) / norm(given.grads), norm(apart) / given.steps.last.abs()
        if bool((part > _ROUNDING) & (off > _NOTHING * size)):
            raise ValueError(
                f"step {step}: train_loss(inputs), run again at the step's weights, gives another gradient than the loop's"
                f" backward pass ({float(part):.1e} apart, which is {float(off / size):.0%} of the small difference of"
                " gradients that feedback='differences' takes): it must return what the loop calls backward() on, up to a"
                " factor, and draw random numbers from torch alone"
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
