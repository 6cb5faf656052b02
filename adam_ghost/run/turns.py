"""The optimizers' turns in a step: several step one after another, all by the gradients that were scored before the first."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adam_ghost.optim import edits_gradients
from adam_ghost.run.readback import Readback
from adam_ghost.step.fingerprint import FinalGradients


class Turns:
    """Which optimizers have yet to take the step that was begun, and what was scored of it.

    Methods that say so raise RuntimeError where the scores are not those of the step that is taken.
    """

    def __init__(self, several: bool):
        self._several = several
        self._awaited: set[torch.optim.Optimizer] = set()
        self._scored: dict[torch.optim.Optimizer, FinalGradients] = {}
        self._doubts: list[Readback] = []  # whether gradients of earlier steps were changed after they were scored

    def clear(self) -> None:
        self._awaited, self._scored, self._doubts = set(), {}, []

    def begin(self, optimizers: set[torch.optim.Optimizer]) -> None:
        """These will take the step."""
        self._awaited = optimizers

    def keep(self, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
        """The gradients of ``params``, which ``optimizer`` is to step by, are those that were scored."""
        self._scored[optimizer] = FinalGradients(params)

    def awaits(self, optimizer: torch.optim.Optimizer) -> bool:
        return optimizer in self._awaited

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a later optimizer's turn: it has to step by what was scored before the first one moved weights; raises."""
        scored = self._scored.get(optimizer)
        if scored is None:
            return
        changed = scored.changed()
        if changed.device.type != "cpu":  # looking would wait for the device
            self._doubts.append(Readback(changed))
        if getattr(optimizer, "grad_scale", None) is not None or (changed.device.type == "cpu" and bool(changed)):
            self._refuse_late()

    @staticmethod
    def _refuse_late() -> None:
        raise RuntimeError(
            "gradients of one optimizer changed after another had begun the step, when all were scored: unscale or clip all of them"
            " before the first optimizer steps (with a gradient scaler, call scaler.unscale_(optimizer) for each)"
        )

    def taken(self, optimizer: torch.optim.Optimizer) -> bool:
        """After an optimizer's turn: whether it was the last one; raises."""
        scored = self._scored.pop(optimizer, None)
        if scored is not None and not edits_gradients(optimizer) and not scored.untouched():
            raise RuntimeError(
                "the gradients were changed after the run had scored them, by another hook of the optimizer (clipping?): the scores"
                " would not be those of the step. Register that hook before the run is built"
            )
        if optimizer not in self._awaited:
            return False
        self._awaited.remove(optimizer)
        return not self._awaited

    def end(self, step: int) -> bool:
        """Optimizers that have not stepped by now will not: whether a step had been begun that waited for them; raises."""
        for doubt in self._doubts:
            if doubt.get().any():
                self._refuse_late()
        self._doubts = []
        if not self._awaited:
            return False
        absent = [type(each).__name__ for each in self._awaited if each in self._scored]
        if absent and self._several:
            raise RuntimeError(
                f"step {step}: {', '.join(sorted(absent))} did not step, but its parameters have gradients and were scored"
                " with the others': step every optimizer once in each step, or clear the gradients of those that rest before the"
                " first one steps (zero_grad)"
            )
        self.clear()
        return True
