"""What attribution asks of the host in one step: a GPT so narrow that Python is all there is, on one thread.

A GPU works through its queue while Python fills it: a step that costs the host more than the GPU's arithmetic makes the GPU
wait. Times are those of a CPU, every variant in turn with the bound (training and a bare validation pass), and told as ratios to
it. Function calls, Python's and C's, are counted too: they do not depend on the machine's mood.

On a CPU calls of layers as small as these are contracted together, by one call of the extension. Variants ``layer by layer`` go
without that, as a GPU does. ``by heart`` is midpoint's arithmetic with nothing around it: hooks on layers that it knows, nothing
followed, verified or booked. What the others take beyond it is the price of not knowing the model.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost import AdamState, extension
from adam_ghost.demo.model import GPT
from adam_ghost.optim import adam_op
from adam_ghost.scores import together

LAYERS, WIDTH, SAMPLES, TOKENS, VOCABULARY = 12, 32, 4, 16, 65
APART = ", layer by layer"
WAYS = ("lookahead", "midpoint", "thin layer")
VARIANTS = ("plain", "bound", "by heart", *WAYS, *(way + APART for way in WAYS))
BUDGET = {"lookahead": 1.4, "midpoint": 1.5, "thin layer": 1.7}  # times the bound


class ByHeart:
    """Scores of this GPT's steps, of its layers alone: the positions' are left out."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, val_loss: Callable[[], torch.Tensor]):
        self.val_loss, self.on = val_loss, False
        self.params = list(model.parameters())
        self.kept = [torch.empty_like(p) for p in self.params]
        self.calls: list[tuple[nn.Module, torch.Tensor, list[torch.Tensor]]] = []
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.LayerNorm, nn.Embedding)):
                layer.register_forward_hook(self.record)
        optimizer.register_step_pre_hook(self.score)

    def record(self, layer: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        if self.on and len(out) == SAMPLES:
            grads: list[torch.Tensor] = []
            self.calls.append((layer, args[0].detach(), grads))
            out.register_hook(grads.append)

    def score(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.on = False
        data, grads = [p.data for p in self.params], [p.grad for p in self.params]
        *moments, steps = AdamState.of(optimizer).lists(self.params)
        torch._foreach_copy_(self.kept, data)
        adam_op.weight_points(data, grads, *moments, steps, mid=data)
        val_grads = [g.unsqueeze(0) for g in torch.autograd.grad(self.val_loss(), self.params)]
        torch._foreach_copy_(data, self.kept)
        P, _ = adam_op.variance_correction(data, grads, *moments, val_grads, steps, out=val_grads)
        of = dict(zip(self.params, P, strict=True))
        kinds = {nn.Linear: together._LINEAR, nn.LayerNorm: together._LAYER_NORM, nn.Embedding: together._EMBEDDING}
        told = []
        for layer, x, (grad,) in self.calls:
            bias = getattr(layer, "bias", None)
            eps = getattr(layer, "eps", 0.0)
            told.append((kinds[type(layer)], x, grad, of[layer.weight], None if bias is None else of[bias], eps, -1))
        self.calls = []
        self.scores = torch.zeros(SAMPLES, 1, dtype=torch.float64)
        left = extension.C.contract_calls(told, self.scores, together.LARGEST, together.EVERY, together.EVERY)
        assert not left, [(told[i][0], [getattr(x, "shape", x) for x in told[i]]) for i in left][:3]


def stepper(variant: str) -> Callable[[], Any]:
    """A function that takes one step in the midst of a training; returns the step's scores where the thin layer has them."""
    variant, apart = variant.removesuffix(APART), variant.endswith(APART)
    torch.manual_seed(0)
    model = GPT(VOCABULARY, TOKENS, LAYERS, WIDTH, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES + 1, TOKENS + 1))
    params = list(model.parameters())

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def val_loss() -> torch.Tensor:
        return loss(tokens[SAMPLES:])

    with patch.multiple(together, SMALL=0) if apart else nullcontext():
        run = ag.InRun(model, optimizer, val_loss, variant) if variant in ("lookahead", "midpoint") else None
    cache = ag.LayerCache(model, val_loss) if variant == "thin layer" else None
    by_heart = ByHeart(model, optimizer, val_loss) if variant == "by heart" else None

    def step() -> Any:
        with patch.multiple(together, SMALL=0, LARGEST=0) if apart else nullcontext():
            return take()

    def take() -> Any:
        scores = None
        if run:
            run.batch(range(SAMPLES))
        if by_heart:
            by_heart.on = True
        if cache:
            with cache:
                loss(tokens[:SAMPLES]).backward()
            scores = ag.attribute(cache, optimizer)
        else:
            loss(tokens[:SAMPLES]).backward()
        if variant == "bound":
            torch.autograd.grad(val_loss(), params)
        optimizer.step()
        optimizer.zero_grad()
        return scores

    for _ in range(14):
        step()  # lookahead goes the midpoint's way for ten steps
    return step


def calls(step: Callable[[], Any]) -> int:
    """Function calls of one step."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def measure(rounds: int = 40, variants: tuple[str, ...] = VARIANTS) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, their ratio to the bound's, and function calls; medians of ``rounds``.

    Every variant takes its steps in turn with the bound alone: among more models than caches hold, none would find its own there,
    as the one model of a training does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for v in variants:
            pair = {"bound": stepper("bound"), v: stepper(v)}  # one, for the bound itself
            times: dict[str, list[float]] = {name: [] for name in pair}
            for k in range(rounds):
                for name in pair if k % 2 else reversed(pair):
                    started = time.thread_time()
                    pair[name]()
                    times[name].append(time.thread_time() - started)
            ratio = statistics.median(a / b for a, b in zip(times[v], times["bound"], strict=True))
            found[v] = {"ms": 1e3 * statistics.median(times[v]), "of_bound": ratio, "calls": calls(pair[v])}
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    for name, row in measure().items():
        print(f"{name:26s} {row['ms']:7.2f} ms  {row['of_bound']:.2f} of the bound  {row['calls']} calls")
