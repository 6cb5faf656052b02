"""Any code: its derivative along P times the output gradients; or, without forward mode, one backward pass per sample."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from adam_ghost.capture.batch import Tag
from adam_ghost.capture.calls import Call
from adam_ghost.capture.names import counterpart
from adam_ghost.capture.rows import Rows
from adam_ghost.scores.forms import Asked, Directions, Form, register
from adam_ghost.scores.products import GROUPED, along, grouped_product, is_linear, is_sum, scores_of_rows
from adam_ghost.scores.shapes import add, by_row, by_token, collect_rows, samples_of, sum_samples


def scores(call: Call, P: Directions, asked: Asked) -> Tensor:
    rows = scores_of_rows(call, P, asked)
    if rows is not None:
        return rows
    params = {name: p for name, p in call.parameters().items() if name in P}
    per_token = asked.per_token or asked.packing is not None
    products = _derivative(call, P, params, asked.n, per_token)
    if products is None:
        if asked.per_token:
            raise ValueError(f"per_token=True: '{call.name}' has no forward-mode derivative, which per-token scores need")
        return _by_sample(call, P, params, asked)
    outputs = [_collected(call.outputs[i], x, asked) for i, x in products.items()]
    if asked.per_token and len({x.shape for x in outputs}) > 1:
        raise ValueError(f"per_token=True: the outputs of '{call.name}' have different numbers of tokens")
    return add(outputs)


def _collected(tag: Tag, x: Tensor, asked: Asked) -> Tensor:
    """Products with an output's gradient, by token ``[n, T, K]`` or by row ``[M, K]``, summed as they were asked for."""
    if isinstance(tag, Rows):
        return collect_rows(x, tag, asked)
    if asked.packing is not None:
        return sum_samples(x, asked.packing)
    return x if asked.per_token else x.sum(1)


class _TrueForwardMode(TorchFunctionMode):
    """Refuses functions whose gradient is by intent not their derivative, which forward mode would take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if counterpart(func) in GROUPED:
            return grouped_product(func, *args, **kwargs)
        if func is F.embedding:
            options = dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args[2:], strict=False)) | kwargs
            if options.get("padding_idx") is not None or options.get("scale_grad_by_freq"):
                raise NotImplementedError("embedding leaves out or scales gradients")
        return func(*args, **kwargs)


@contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, forward mode takes the ways that have one, and refuses those where it is not what the backward pass takes."""
    with _TrueForwardMode(), sdpa_kernel(SDPBackend.MATH):
        yield


def _derivative(call: Call, P: Directions, params: Mapping[str, Tensor], n: int, per_token: bool) -> dict[int, Tensor] | None:
    """The call's derivative along P, times the output gradients, per output; None if it has no forward mode.

    ``[n, T, K]``, or ``[n, 1, K]`` where no tokens are asked for and the product need not be kept to be summed; ``[M, K]`` by row.

    A call linear in its parameters is its own derivative: it is run with P in their place, and of a difference with them zeros in
    that of the rest. A sum with them moves by P itself.
    """
    names = list(params)
    tags, grads = call.outputs, call.grad_output
    adds = is_sum(call)
    moved = along(call, P) if adds else None
    affine = adds or is_linear(call)
    found: dict[int, list[Tensor]] = {i: [] for i in grads}
    for k in range(len(P[names[0]])):
        tangents = {name: P[name][k] for name in names}
        if moved is not None:
            outs = {i: moved[k].expand(grad.shape) for i, grad in grads.items()}
        elif affine:
            outs = dict(enumerate(call.replay(tangents, torch.zeros_like, torch.zeros_like if adds else None)))
        else:

            def outputs(*values: Tensor) -> dict[int, Tensor]:
                outs = call.replay(dict(zip(names, values, strict=True)))
                return {i: outs[i] for i in grads}

            primals = tuple(params[name].detach().to(t.dtype) for name, t in tangents.items())
            try:
                with forward_mode():
                    outs = torch.func.jvp(outputs, primals, tuple(tangents.values()))[1]
            except (NotImplementedError, RuntimeError):  # no forward-mode formula on this path, or a custom autograd.Function
                return None
        for i in grads:
            out, grad, tag = outs[i], grads[i].to(outs[i].dtype), tags[i]
            if isinstance(tag, Rows):
                found[i].append(by_row(out * grad, tag))
            elif per_token or tag != (0, 1):
                found[i].append(by_token(out * grad, tag, n))
            else:
                found[i].append(torch.linalg.vecdot(out.reshape(n, -1), grad.reshape(n, -1)).unsqueeze(1))
    return {i: torch.stack(x, -1) for i, x in found.items()}


def _by_sample(call: Call, P: Directions, params: Mapping[str, Tensor], asked: Asked) -> Tensor:
    """``[n, K]`` from one backward pass of the call per sample: slow, and right for any differentiable code."""
    names = list(params)
    dtype = P[names[0]].dtype
    rows = [
        add((P[name] * g.to(dtype)).flatten(1).sum(1) for name, g in zip(names, grads, strict=True) if g is not None)
        for grads in call_gradients(call, names, asked)
    ]
    return torch.stack(rows)


def call_gradients(call: Call, names: Sequence[str], asked: Asked) -> Iterator[tuple[Tensor | None, ...]]:
    """Per sample, the gradients of the named parameters through this call: its backward pass, the other samples' share zeroed."""
    params = call.parameters()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaves = [params[k].detach().to(torch.promote_types(params[k].dtype, torch.float32)).requires_grad_() for k in names]
        replayed = call.replay(dict(zip(names, leaves, strict=True)))
        outs = [replayed[i] for i in call.grad_output]
    of = {k: samples_of(grad, call.outputs[k], asked) for k, grad in call.grad_output.items()}
    for i in range(asked.samples):
        shares = [
            torch.where(of[k] == i, grad, 0.0).to(out.dtype) for (k, grad), out in zip(call.grad_output.items(), outs, strict=True)
        ]
        yield torch.autograd.grad(outs, leaves, shares, retain_graph=i < asked.samples - 1, allow_unused=True)


register("affine", Form(scores))
