"""What the scores explain: the parameters that were left out, and the check that the scores add up to the step's gradient."""

from collections.abc import Callable

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adam_ghost.capture.walk import modules
from adam_ghost.warn import warn

# of the scores' size: beyond it the scores do not add up to < P , g(B) >, and something is missing or scaled wrongly
SELF_CHECK = 0.02


class Coverage:
    """Tells, once, of parameters that no recorded call explains and of scores that do not add up; raises under ``strict``."""

    def __init__(self, strict: bool):
        self.strict, self.share = strict, 1.0
        self.blamed: list[str] = []  # parameters whose calls do not explain their gradient
        self._told: set[str] = set()

    def misses(self, scores: np.ndarray, total: np.ndarray) -> bool:
        """Whether scores ``[..., K]`` do not add up to the step's ``total [K]``; NaN never does."""
        scores = scores.reshape(-1, scores.shape[-1])
        size = np.maximum(np.abs(total), np.sqrt(np.square(scores).sum(0)))
        return not np.all(np.abs(scores.sum(0) - total) <= SELF_CHECK * size)

    def blame(self, scores: np.ndarray, total: np.ndarray, why: Callable[[], list[str]]) -> None:
        """Has ``why`` name the parameters at fault, if ``check`` will have something new to tell."""
        if "sum" not in self._told and self.misses(scores, total):
            self.blamed = why()

    def check(self, scores: np.ndarray, total: np.ndarray, where: str = "") -> None:
        """Tells if the scores do not add up to the covered parameters' ``total``. Raises RuntimeError under ``strict``."""
        if self.misses(scores, total):
            blamed = f", of {', '.join(self.blamed[:6])}," if self.blamed else ""
            found = scores.reshape(-1, scores.shape[-1]).sum(0).tolist()
            of = "the step's gradient" if self.share == 1 else "the covered parameters' gradient"
            self.tell(
                "sum",
                f"{where}the scores add up to {found}, but {of} to {total.tolist()}: part of the gradient{blamed}"
                " did not come from the recorded samples (a penalty on the weights, a hook on gradients, gradients from before, a"
                " weight that the loss uses outside of the model)",
            )

    def report(self, missing: list[str], share: float) -> None:
        """Takes the names of parameters whose gradient no recorded call explains; raises RuntimeError under ``strict``."""
        self.share = share
        if not missing:
            return
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        self.tell("missing", f"not attributed: {shown}; the scores cover {share:.1%} of the parameters that got a gradient")

    def tell(self, what: str, message: str) -> None:
        """Warns with ``message``, once for each ``what``; raises RuntimeError under ``strict``."""
        if self.strict:
            raise RuntimeError(message)
        if what not in self._told:
            self._told.add(what)
            warn(message)


def refuse_mixed_samples(model: nn.Module) -> None:
    """Raises ValueError, by name, if a layer in its present mode mixes the samples of a batch."""
    for module in modules(model):
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            name = next(name for name, m in model.named_modules() if m is module)
            why = "in training mode" if module.training else "without running statistics"
            cure = "put it in eval()" if module.training else "use track_running_stats=True, or another norm"
            raise ValueError(f"'{name}' is a {type(module).__name__} {why}: it mixes the samples of a batch; {cure}")
