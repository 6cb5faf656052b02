"""What the scores explain: the parameters that were left out, and the check that the scores add up to the step's gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adam_ghost.warn import warn

# of the validation loss: what its evaluations in several processes may differ by
_ALIKE = 1e-3
# of the scores' size: beyond it the scores do not add up to < P , g(B) >, and something is missing or scaled wrongly
SELF_CHECK = 0.02


class Joined(NamedTuple):
    """What is known of all scores of a step, ``[K]`` each, whichever process has them."""

    samples: int
    sum: np.ndarray
    squares: np.ndarray
    val_loss: np.ndarray | None = None  # the mean of what the processes have for the validation loss; None: there is but one

    @classmethod
    def of(cls, scores: np.ndarray) -> "Joined":
        """Of scores ``[..., K]`` that are all here."""
        scores = scores.reshape(-1, scores.shape[-1])
        return cls(len(scores), scores.sum(0), np.square(scores).sum(0))


class Coverage:
    """Tells, once, of parameters that no recorded call explains and of scores that do not add up; raises under ``strict``."""

    def __init__(self, strict: bool):
        self.strict, self.share = strict, 1.0
        self.forward_mode = True  # whether the whole model may have one, as far as it was tried
        self.blamed: list[str] = []  # parameters whose calls do not explain their gradient
        self._told: set[str] = set()

    def misses(self, scores: Joined, total: np.ndarray) -> bool:
        """Whether the scores do not add up to the step's ``total [K]``; NaN never does."""
        size = np.maximum(np.abs(total), np.sqrt(scores.squares))
        return not np.all(np.abs(scores.sum - total) <= SELF_CHECK * size)

    def blame(self, scores: Joined, total: np.ndarray, why: Callable[[], list[str]]) -> None:
        """Has ``why`` name the parameters at fault, if ``check`` will have something new to tell."""
        if "sum" not in self._told and self.misses(scores, total):
            self.blamed = why()

    def check(self, scores: Joined, total: np.ndarray, where: str = "") -> None:
        """Tells if the scores do not add up to the covered parameters' ``total``. Raises RuntimeError under ``strict``."""
        if self.misses(scores, total):
            blamed = f", of {', '.join(self.blamed[:6])}," if self.blamed else ""
            found = scores.sum.tolist()
            of = "the step's gradient" if self.share == 1 else "the covered parameters' gradient"
            self.tell(
                "sum",
                f"{where}the scores add up to {found}, but {of} to {total.tolist()}: part of the gradient{blamed}"
                " did not come from the recorded samples (a penalty on the weights, a hook on gradients, gradients from before, a"
                " weight that the loss uses outside of the model)",
            )

    def check_alike(self, val_loss: np.ndarray, scores: Joined, where: str = "") -> None:
        """Tells if this process's ``val_loss [K]`` is another than the other processes'. Raises RuntimeError under ``strict``."""
        if scores.val_loss is None or np.all(np.abs(val_loss - scores.val_loss) <= _ALIKE * np.abs(scores.val_loss)):
            return
        self.tell(
            "alike",
            f"{where}val_loss is {val_loss.tolist()} here and {scores.val_loss.tolist()} in the mean of the processes, whose"
            " scores are then of different losses: evaluate the same batch in all of them, or give each its part and say"
            " val_split=True",
        )

    def report(self, missing: list[str], share: float) -> None:
        """Takes the names of parameters whose gradient no recorded call explains; raises RuntimeError under ``strict``."""
        self.share = share
        if not missing:
            return
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        self.tell("missing", f"not attributed: {shown}; the scores cover {share:.1%} of the parameters that got a gradient")

    def tell_of_passes(self, names: list[str], grads: Mapping[str, Tensor], scored: bool) -> None:
        """Says once that layer calls lost parameters, and whether a pass of the whole model scores them."""
        share = share_of(names, grads)
        if not scored:
            self.forward_mode = False
            self.report(names, self.share - share)
        elif "passes" not in self._told:
            self._told.add("passes")
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            warn(
                f"lost by the layer calls: {shown}; they, {share:.1%} of the parameters, are scored by a forward-mode pass of the"
                " whole model in each step, about two forward passes more (fallback=False leaves them out)"
            )

    def tell(self, what: str, message: str) -> None:
        """Warns with ``message``, once for each ``what``; raises RuntimeError under ``strict``."""
        if self.strict:
            raise RuntimeError(message)
        if what not in self._told:
            self._told.add(what)
            warn(message)


def share_of(names: Sequence[str], grads: Mapping[str, Tensor]) -> float:
    """Which part of all elements of ``grads`` those of these names are."""
    return sum(grads[name].numel() for name in names) / sum(g.numel() for g in grads.values())


def refuse_mixed_samples(modules: Sequence[nn.Module]) -> None:
    """Raises ValueError, by name, if one of a model's modules in its present mode mixes the samples of a batch."""
    for module in modules:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, m in modules[0].named_modules() if m is module)
            why = "in training mode" if module.training else "without running statistics"
            cure = "put it in eval()" if module.training else "use track_running_stats=True, or another norm"
            raise ValueError(f"'{name}' is a {type(module).__name__} {why}: it mixes the samples of a batch; {cure}")
