"""What a step is made of, checked before anything is computed: the recorded calls, the final gradients, Adam's state."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adam_ghost.capture import Recording
from adam_ghost.contract import Directions, contract_all
from adam_ghost.layer_cache import Coverage, LayerCache
from adam_ghost.sample_gradients import sample_gradients
from adam_ghost.state import AdamState


@dataclass
class Step:
    """One step about to be taken: the parameters that will move by their gradient, and the recordings that explain it.

    The samples of several recordings (the micro-batches of an accumulated step) count on, one after another.
    """

    state: AdamState
    params: list[nn.Parameter]
    grads: list[Tensor]
    recordings: list[Recording]
    scale: dict[int, Tensor] | None = None  # by parameter id: what the gradient was multiplied by since it was recorded

    def sample_gradients(self, p: nn.Parameter, block: slice = slice(None)) -> Tensor:
        """``[n, *p[block].shape]``: each sample's share of ``p.grad``, for a block of p's first dimension."""
        shares = torch.cat([sample_gradients(r.calls, p, r.batch_size, block) for r in self.recordings])
        return shares if self.scale is None else shares * self.scale[id(p)]

    def scores(self, P: Directions, per_token: bool = False, half: bool = False) -> Tensor:
        """``[n, K]`` (``[n, T, K]`` with ``per_token``): every sample's ``< P , g_i >``; ``half`` as in ``contract``."""
        if self.scale is not None:
            P = {k: x * self.scale[k] for k, x in P.items()}
        return contract_all(self.recordings, P, per_token, half)


def gather_step(model: nn.Module, state: AdamState, recordings: list[Recording], coverage: Coverage) -> Step:
    """The step of ``model``'s parameters that have a gradient, checked; ``coverage`` is told which ones no call explains."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
    if not named:
        raise ValueError("no parameter has a gradient: compute the scores before optimizer.zero_grad()")
    for name, p in named:
        if p not in state:
            raise ValueError(f"'{name}' has a gradient but is not among the optimizer's parameters: freeze it or add it")
        if p.grad.layout is not torch.strided:
            raise ValueError(f"'{name}' has a sparse gradient, which Adam does not take: use sparse=False")
    covered = {p for r in recordings for p in r.covered()}
    # zeros left by zero_grad(set_to_none=False) under a layer that did not run are no gradient: nothing is missing there
    missing = [(name, p) for name, p in named if id(p) not in covered and bool(p.grad.any())]
    inside = {id(p) for p in model.parameters()}
    outside = [s.param for s in state if s.param.grad is not None and id(s.param) not in inside]
    total = sum(p.numel() for _, p in named) + sum(p.numel() for p in outside)
    lost = sum(p.numel() for _, p in missing) + sum(p.numel() for p in outside)
    coverage.report([name for name, _ in missing] + ["parameters outside the model"] * bool(outside), 1 - lost / total)
    return Step(state, [p for _, p in named], [p.grad for _, p in named], recordings)


def open_step(cache: LayerCache, opt_state: "torch.optim.Optimizer | AdamState") -> Step:
    """The step that ``cache`` recorded, checked before anything is computed or changed. Errors as in ``attribute``."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"layer_cache must be an adam_ghost.LayerCache, got {type(cache).__name__}")
    state = AdamState.of(opt_state)
    if cache.recording:
        raise ValueError("the scores are computed after the `with cache` block, not inside it")
    if not cache.recorded.calls:
        raise ValueError("nothing was recorded: run the model's forward and backward pass inside `with cache`")
    if not cache.same_weights():
        raise ValueError("the weights changed since `with cache`: compute the scores before optimizer.step()")
    for name, p in cache.model.named_parameters():
        # looking costs no synchronisation on the CPU; on a GPU the scores come out as not finite
        looked_at = p.grad is not None and p.grad.device.type == "cpu" and p.grad.layout is torch.strided
        if looked_at and not bool(p.grad.isfinite().all()):
            raise ValueError(f"the gradient of '{name}' is not finite")
    step = gather_step(cache.model, state, [cache.recorded], cache.coverage)
    step.scale = cache.scaled_since()
    cache.used = True
    return step
