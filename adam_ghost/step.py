"""What a step is made of, checked before anything is computed: the recorded calls, the final gradients, Adam's state."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adam_ghost.calls import Call
from adam_ghost.capture import LayerCache
from adam_ghost.state import AdamState


@dataclass
class Step:
    """One step about to be taken: the parameters that will move by their gradient, and the calls that explain it."""

    state: AdamState
    params: list[nn.Parameter]
    grads: list[Tensor]
    calls: list[Call]
    n: int


def open_step(cache: LayerCache, opt_state: "torch.optim.Optimizer | AdamState") -> Step:
    """Checks what ``cache`` and ``opt_state`` hold and puts it together; changes neither. Errors as in ``attribute``."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"layer_cache must be an adam_ghost.LayerCache, got {type(cache).__name__}")
    state = AdamState.of(opt_state)
    if cache.recording:
        raise ValueError("the scores are computed after the `with cache` block, not inside it")
    if not cache.calls:
        raise ValueError("nothing was recorded: run the model's forward and backward pass inside `with cache`")
    named = [(name, p) for name, p in cache.model.named_parameters() if p.requires_grad and p.grad is not None]
    if not named:
        raise ValueError("no parameter has a gradient: compute the scores before optimizer.zero_grad()")
    for name, p in named:
        if p not in state:
            raise ValueError(f"'{name}' has a gradient but is not among the optimizer's parameters: freeze it or add it")
        if p.grad.layout is not torch.strided:
            raise ValueError(f"'{name}' has a sparse gradient, which Adam does not take: use sparse=False")
        if p.grad.device.type == "cpu" and not bool(p.grad.isfinite().all()):
            raise ValueError(f"the gradient of '{name}' is not finite")
    seen = {id(p) for call in cache.calls for p in call.parameters()} - cache.unattributed.keys()
    missing = [(name, p) for name, p in named if id(p) not in seen]
    inside = {id(p) for p in cache.model.parameters()}
    missing += [("a parameter outside the model", s.param) for s in state if s.param.grad is not None and id(s.param) not in inside]
    if missing:
        total = sum(p.numel() for _, p in named) + sum(p.numel() for _, p in missing if id(p) not in inside)
        cache.report_uncovered([name for name, _ in missing], 1 - sum(p.numel() for _, p in missing) / total)
    cache.used = True
    return Step(state, [p for _, p in named], [p.grad for _, p in named], cache.calls, cache.batch_size)
