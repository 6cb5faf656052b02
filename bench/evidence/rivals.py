"""Other ways to one step's scores, each a whole training step, written here for a comparison of speed on equal terms.

All score the same thing, a mean loss' samples against one validation loss: by per-sample gradients (``torch.func``, opacus), by
one forward-mode pass along the direction, or by gradient dot products inside one backward pass of the training and the validation
batch together, as In-Run Data Shapley for SGD does (arXiv 2406.11011; written by that paper, in float32).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from adam_ghost.demo.model import GPT

Step = Callable[[Tensor, Tensor], Tensor]  # training and validation tokens to scores [n]; gradients are left in .grad


def _losses(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none").mean(1)


def _validation_gradient(model: nn.Module, x_val: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(_losses(model, x_val).mean(), list(named.values())), strict=True))


def per_sample(model: nn.Module) -> Step:
    """``vmap(grad)``: exact, with all per-sample gradients in memory."""

    def one(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, w, (x[None, :-1],))[0], x[1:])

    def step(x: Tensor, x_val: Tensor) -> Tensor:
        direction = _validation_gradient(model, x_val)
        w = {k: p.detach() for k, p in model.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):
            found = vmap(grad(one), (None, 0))(w, x)
        for k, p in model.named_parameters():
            p.grad = found[k].mean(0)
        return torch.stack([found[k].flatten(1) @ d.flatten() for k, d in direction.items()]).sum(0) / len(x)

    return step


def forward_mode(model: nn.Module) -> Step:
    """``torch.func.jvp`` of the per-sample losses along the direction: exact, any architecture with forward derivatives."""

    def step(x: Tensor, x_val: Tensor) -> Tensor:
        direction = _validation_gradient(model, x_val)
        _losses(model, x).mean().backward()
        w = {k: p.detach() for k, p in model.named_parameters()}

        def losses(w: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, w, (x[:, :-1],)).mT, x[:, 1:], reduction="none").mean(1)

        with sdpa_kernel(SDPBackend.MATH):
            return jvp(losses, (w,), (direction,))[1] / len(x)

    return step


def opacus(model: nn.Module) -> Step:
    """opacus' per-sample gradients by hooks, and their dot products."""
    from opacus import GradSampleModule

    model = GradSampleModule(_BatchedPositions(model), loss_reduction="mean")

    def step(x: Tensor, x_val: Tensor) -> Tensor:
        params = list(model.parameters())
        with _without_hooks(model):
            direction = torch.autograd.grad(_losses(model, x_val).mean(), params)
        _losses(model, x).mean().backward()
        scores = [p.grad_sample.flatten(1) @ d.flatten() for p, d in zip(params, direction, strict=True)]
        for p in params:
            p.grad_sample = None
        return torch.stack(scores).sum(0) / len(x)

    return step


class _BatchedPositions(nn.Module):
    """The GPT with positions for each sample and a head of its own, as opacus' hooks need them."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.tokens, self.positions, self.blocks, self.norm = gpt.tokens, gpt.positions, gpt.blocks, gpt.norm
        self.head = nn.Linear(gpt.head.in_features, gpt.head.out_features, bias=False)
        self.head.weight = nn.Parameter(gpt.head.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).expand(len(ids), -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    model.disable_hooks()
    try:
        yield
    finally:
        model.enable_hooks()


def in_graph_dots(model: nn.Module) -> Step:
    """One backward pass of training and validation samples together; each layer's backward pass dots their gradients."""
    found: list[Tensor] = []
    split = rows = 0

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            ctx.save_for_backward(x, w)
            ctx.biased = b is not None
            return F.linear(x, w, b)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            x, w = ctx.saved_tensors
            x_train, x_val, g_train, g_val = x[:split], x[split:], g[:split], g[split:]
            val = g_val.flatten(0, 1).T @ x_val.flatten(0, 1)  # [out, in]
            found.append(((x_train @ val.T) * g_train).sum((1, 2)))
            bias = None
            if ctx.biased:
                each = g_train.sum(1)
                bias = each.sum(0)
                found.append(each @ g_val.sum((0, 1)))
            return g @ w, g_train.flatten(0, 1).T @ x_train.flatten(0, 1), bias

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            out, mean, scale = torch.native_layer_norm(x, w.shape, w, b, 1e-5)
            ctx.save_for_backward(x, mean, scale, w, b)
            return out

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            x, mean, scale, w, b = ctx.saved_tensors
            back = torch.ops.aten.native_layer_norm_backward(g, x, w.shape, mean, scale, w, b, [True, False, False])[0]
            each_w, each_b = (g * ((x - mean) * scale)).sum(1), g.sum(1)  # [n + m, width]
            for each in (each_w, each_b):
                found.append(each[:split] @ each[split:].sum(0))
            return back, each_w[:split].sum(0), each_b[:split].sum(0)

    class Embedding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, ids: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(ids)
            ctx.rows = len(w)
            return F.embedding(ids, w)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
            (ids,) = ctx.saved_tensors
            val, train = (
                torch.zeros(ctx.rows, g.shape[-1]).index_add_(0, i.flatten(), x.flatten(0, 1))
                for i, x in ((ids[split:], g[split:]), (ids[:split], g[:split]))
            )
            found.append((val[ids[:split]] * g[:split]).sum((1, 2)))
            return None, train

    kinds = {nn.Linear: Linear, nn.LayerNorm: Norm}
    for module in model.modules():
        if type(module) in kinds:
            function = kinds[type(module)]
            module.forward = lambda x, f=function, m=module: f.apply(x, m.weight, m.bias)
        elif isinstance(module, nn.Embedding):
            # positions come without samples: given them, so that each has its own
            module.forward = lambda ids, m=module: Embedding.apply(ids if ids.ndim > 1 else ids.expand(rows, -1), m.weight)

    def step(x: Tensor, x_val: Tensor) -> Tensor:
        nonlocal split, rows
        split, rows = len(x), len(x) + len(x_val)
        losses = _losses(model, torch.cat([x, x_val]))
        (losses[:split].mean() + losses[split:].mean()).backward()
        total = torch.stack(found).sum(0)
        found.clear()
        return total

    return step


RIVALS: dict[str, Callable[[nn.Module], Step]] = {
    "dots inside one backward pass (SGD only)": in_graph_dots,
    "per-sample gradients, vmap(grad)": per_sample,
    "per-sample gradients, opacus": opacus,
    "one forward-mode pass, jvp": forward_mode,
}


def installed(name: str) -> bool:
    return "opacus" not in name or find_spec("opacus") is not None
