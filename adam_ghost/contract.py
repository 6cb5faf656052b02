"""From a recorded call and the direction ``P`` to every sample's ``< P , g_i >``, without per-sample gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adam_ghost import ops
from adam_ghost.batching import Tag
from adam_ghost.calls import Call
from adam_ghost.capture import Recording
from adam_ghost.layers import layer_kind
from adam_ghost.sample_gradients import call_gradients, samples_first

Directions = dict[int, Tensor]  # id(parameter) -> P [K, *shape]


def contract(call: Call, P: Directions, n: int, per_token: bool = False, half: bool = False) -> Tensor:
    """Scores of one call's share of the gradient: ``[n, K]``, or ``[n, T, K]`` per token. Sums in P's dtype.

    With ``half``, the operands of large products may be rounded to bfloat16.

    Raises ValueError where ``per_token`` is asked of a call whose outputs have no token dimension.
    """
    kind = layer_kind(call.fn)
    if kind in ("linear", "conv1d"):
        per_output = {0: _linear(call, P, n, kind == "conv1d", per_token, half)}
    elif kind == "embedding":
        per_output = {0: _embedding(call, P, n, per_token)}
    elif kind == "affine" and _fused_norm(call, P):
        per_output = {0: _norm(call, P, n, per_token)}
    else:
        # an argument made of parameters makes it a product of two
        affine = kind == "affine" and all(any(p is q for q in call.own.values()) for p in call.parameters())
        per_output = _derivative(call, P, n, affine, per_token)
        if per_output is None:
            if per_token:
                raise ValueError(f"per_token=True: '{call.name}' has no forward-mode derivative, which per-token scores need")
            return _by_sample(call, P, n)
    if not per_token:
        return sum(x.sum(1) for x in per_output.values())
    rows = {tag[1] for tag in call.outputs.values()}
    shapes = {grad.ndim for grad in call.grad_output.values()}
    if (isinstance(call.fn, nn.Module) and "conv" in type(call.fn).__module__) or (rows == {1} and min(shapes) < 3):
        raise ValueError(f"per_token=True needs tokens at dimension 1 of every layer's output; '{call.name}' has none")
    if len({x.shape for x in per_output.values()}) > 1:
        raise ValueError(f"per_token=True: the outputs of '{call.name}' have different numbers of tokens")
    return sum(per_output.values())


def contract_all(recordings: Iterable[Recording], P: Directions, per_token: bool = False, half: bool = False) -> Tensor:
    """``contract`` summed over each recording's calls; the recordings' samples one after another."""
    return torch.cat([_contract_recording(r, P, per_token, half) for r in recordings])


def _contract_recording(recording: Recording, P: Directions, per_token: bool, half: bool) -> Tensor:
    scores: Tensor | None = None
    packed = recording.offsets is not None
    for call in recording.calls:
        if not any(id(p) in P for p in call.parameters()):
            continue
        part = contract(call, P, recording.batch_size, per_token or packed, half)
        if scores is not None and scores.shape != part.shape:
            raise ValueError(
                f"per_token=True needs the same tokens in every layer; '{call.name}' has {part.shape[1]}, others {scores.shape[1]}"
            )
        scores = part if scores is None else scores + part
    if scores is None:
        raise ValueError("none of the recorded calls explains a gradient: was it computed inside `with cache`?")
    return scores if per_token else sum_samples(scores, recording.offsets)


def sum_samples(scores: Tensor, offsets: Tensor | None) -> Tensor:
    """Per-token scores ``[rows, T, K]`` of packed rows summed to ``[n, K]``; without ``offsets``, the scores as they are."""
    if offsets is None:
        return scores
    tokens = scores.flatten(0, 1)
    if int(offsets[-1]) != len(tokens):
        raise ValueError(f"offsets end at {int(offsets[-1])}, but the batch has {len(tokens)} tokens")
    return torch.segment_reduce(tokens, "sum", offsets=offsets.to(tokens.device))


def _by_token(x: Tensor, tag: Tag, n: int) -> Tensor:
    """``[n, T]``: sums a call's output-shaped products over everything but sample and token."""
    x = samples_first(x, tag, n)
    return x.flatten(2).sum(-1) if x.ndim > 2 else x


def _linear(call: Call, P: Directions, n: int, transposed: bool, per_token: bool, half: bool) -> Tensor:
    """``[n, T, K]``, or ``[n, 1, K]`` where no tokens are asked for: one product of forward size."""
    weight, bias = (P.get(id(p)) if p is not None else None for p in (call.fn.weight, call.fn.bias))
    a, b = (samples_first(x, call.outputs[0], n) for x in (call.input, call.grad_output[0]))
    scores: Tensor | int = 0
    if weight is not None:
        weight = weight.mT if transposed else weight
        scores = ops.contract(a.flatten(1, -2), b.flatten(1, -2), weight, per_token=per_token, half=half)
    if bias is not None:
        sums = b.flatten(1, -2).to(bias.dtype) if per_token else b.flatten(1, -2).sum(1, dtype=bias.dtype)
        scores = scores + sums @ bias.mT
    return _tokens(scores, b) if per_token else scores.unsqueeze(1)


def _tokens(scores: Tensor, b: Tensor) -> Tensor:
    """Scores ``[n, rows, K]`` of ``b [n, T, ..., d]``, whose rows they count in a line, as ``[n, T, K]``."""
    return scores.unflatten(1, b.shape[1:-1]).flatten(2, -2).sum(2) if b.ndim > 3 else scores


def _embedding(call: Call, P: Directions, n: int, per_token: bool) -> Tensor:
    """``[n, T, K]``, or ``[n, 1, K]``: rows of P, looked up as the layer looks up its weight."""
    module, indices, b = call.fn, call.input, call.grad_output[0]
    if module.scale_grad_by_freq:
        b = b / torch.bincount(indices.flatten(), minlength=module.num_embeddings)[indices].unsqueeze(-1)
    b = samples_first(b, call.outputs[0], n)
    indices = indices.movedim(call.outputs[0][0], 0).reshape(n, -1)
    options = {"padding_idx": module.padding_idx, "per_token": per_token}
    scores = ops.embedding_score(indices, b.flatten(1, -2), P[id(module.weight)], **options)
    return _tokens(scores, b) if per_token else scores.unsqueeze(1)


def _fused_norm(call: Call, P: Directions) -> bool:
    """Whether a kernel serves this call: elsewhere the layer's own forward, with P in its parameters' place, is as fast."""
    over_last = isinstance(call.fn, (nn.LayerNorm, nn.RMSNorm)) and len(call.fn.normalized_shape) == 1
    return over_last and id(call.fn.weight) in P and ops.has_kernel("norm_score", call.input, call.grad_output[0])


def _norm(call: Call, P: Directions, n: int, per_token: bool) -> Tensor:
    """``[n, T, K]``, or ``[n, 1, K]``, of a norm over the last dimension."""
    module, kind = call.fn, "layer" if isinstance(call.fn, nn.LayerNorm) else "rms"
    x, b = (samples_first(t, call.outputs[0], n) for t in (call.input, call.grad_output[0]))
    weight, bias = (P.get(id(p)) if p is not None else None for p in (module.weight, getattr(module, "bias", None)))
    rows = (t.flatten(1, -2) for t in (x, b))
    scores = ops.norm_score(*rows, weight, bias, module.eps, kind, per_token=per_token)
    return _tokens(scores, b) if per_token else scores.unsqueeze(1)


class _TrueForwardMode(TorchFunctionMode):
    """Refuses functions whose gradient is by intent not their derivative, which forward mode would take."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.embedding:
            options = dict(zip(("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq"), args[2:], strict=False)) | kwargs
            if options.get("padding_idx") is not None or options.get("scale_grad_by_freq"):
                raise NotImplementedError("embedding leaves out or scales gradients")
        return func(*args, **kwargs)


def _derivative(call: Call, P: Directions, n: int, affine: bool, per_token: bool) -> dict[int, Tensor] | None:
    """The call's derivative along P, times the output gradients, per output; None if it has no forward mode.

    ``[n, T, K]``, or ``[n, 1, K]`` where no tokens are asked for and the product need not be kept to be summed.

    A layer linear in its parameters is its own derivative: it is run with P in their place.
    """
    params = [p for p in call.parameters() if id(p) in P]
    tags, grads = call.outputs, call.grad_output
    targets = len(P[id(params[0])])
    scores: dict[int, list[Tensor]] = {i: [] for i in grads}
    for k in range(targets):
        tangents = tuple(P[id(p)][k] for p in params)
        if affine:
            zeros = {id(p): torch.zeros_like(p, dtype=tangents[0].dtype) for p in call.fn.parameters()}
            outs = call.replay(zeros | {id(p): t for p, t in zip(params, tangents, strict=True)})
            outs = {i: outs[i] for i in grads}
        else:

            def outputs(*values: Tensor) -> dict[int, Tensor]:
                outs = call.replay({id(p): v for p, v in zip(params, values, strict=True)})
                return {i: outs[i] for i in grads}

            primals = tuple(p.detach().to(t.dtype) for p, t in zip(params, tangents, strict=True))
            try:
                with _TrueForwardMode():
                    _, outs = torch.func.jvp(outputs, primals, tangents)
            except (NotImplementedError, RuntimeError):  # no forward-mode formula on this path, or a custom autograd.Function
                return None
        for i, out in outs.items():
            grad = grads[i].to(out.dtype)
            if per_token or tags[i] != (0, 1):
                scores[i].append(_by_token(out * grad, tags[i], n))
            else:
                scores[i].append(torch.linalg.vecdot(out.reshape(n, -1), grad.reshape(n, -1)).unsqueeze(1))
    return {i: torch.stack(x, -1) for i, x in scores.items()}


def _by_sample(call: Call, P: Directions, n: int) -> Tensor:
    """``[n, K]`` from one backward pass of the call per sample: slow, and right for any differentiable code."""
    params = [p for p in call.parameters() if id(p) in P]
    dtype = P[id(params[0])].dtype
    rows = [
        sum((P[id(p)] * g.to(dtype)).flatten(1).sum(1) for p, g in zip(params, grads, strict=True) if g is not None)
        for grads in call_gradients(call, params, n)
    ]
    return torch.stack(rows)
