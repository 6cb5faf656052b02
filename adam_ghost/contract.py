"""From a recorded call and the direction ``P`` to every sample's ``< P , g_i >``, without per-sample gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adam_ghost import cpu, reference
from adam_ghost.batching import Tag
from adam_ghost.calls import Call
from adam_ghost.capture import Recording
from adam_ghost.layers import layer_kind
from adam_ghost.sample_gradients import call_gradients, samples_first

Directions = dict[int, Tensor]  # id(parameter) -> P [K, *shape]


def contract(call: Call, P: Directions, n: int, per_token: bool = False) -> Tensor:
    """Scores of one call's share of the gradient: ``[n, K]``, or ``[n, T, K]`` per token. Sums in P's dtype.

    Raises ValueError where ``per_token`` is asked of a call whose outputs have no token dimension.
    """
    kind = layer_kind(call.fn)
    if kind in ("linear", "conv1d"):
        per_output = {0: _linear(call, P, n, kind == "conv1d", per_token)}
    elif kind == "embedding":
        per_output = {0: _embedding(call, P, n)}
    else:
        per_output = _derivative(call, P, n, affine=kind == "affine")
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


def contract_all(recordings: Iterable[Recording], P: Directions, per_token: bool = False) -> Tensor:
    """``contract`` summed over each recording's calls; the recordings' samples one after another."""
    return torch.cat([_contract_recording(r, P, per_token) for r in recordings])


def _contract_recording(recording: Recording, P: Directions, per_token: bool) -> Tensor:
    scores: Tensor | None = None
    packed = recording.offsets is not None
    for call in recording.calls:
        if not any(id(p) in P for p in call.parameters()):
            continue
        part = contract(call, P, recording.batch_size, per_token or packed)
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


def _linear(call: Call, P: Directions, n: int, transposed: bool, per_token: bool) -> Tensor:
    """``[n, T, K]``: one product of forward size."""
    weight, bias = (P.get(id(p)) if p is not None else None for p in (call.fn.weight, call.fn.bias))
    dtype = next(p for p in (weight, bias) if p is not None).dtype
    b = call.grad_output[0].to(dtype)
    scores = 0  # [..., K]
    if weight is not None:
        a, weight = call.input.to(dtype), weight.mT if transposed else weight
        if not per_token and a.device.type == "cpu":
            flat = [samples_first(x, call.outputs[0], n).flatten(1, -2) for x in (a, b)]
            scores = cpu.contract(*flat, weight)
            return (scores if bias is None else scores + flat[1].sum(1) @ bias.mT).unsqueeze(1)
        scores = reference.contract(a, b, weight)
    if bias is not None:
        scores = scores + b @ bias.mT
    return torch.stack([_by_token(s.unsqueeze(-1), call.outputs[0], n) for s in scores.unbind(-1)], -1)


def _embedding(call: Call, P: Directions, n: int) -> Tensor:
    """``[n, T, K]``: rows of P, looked up as the layer looks up its weight."""
    module, indices = call.fn, call.input
    weight = P[id(module.weight)]
    b = call.grad_output[0].to(weight.dtype)
    kept = 1.0 if module.padding_idx is None else (indices != module.padding_idx).unsqueeze(-1)
    if module.scale_grad_by_freq:
        counts = torch.bincount(indices.flatten(), minlength=module.num_embeddings)
        kept = kept / counts[indices].unsqueeze(-1).to(weight.dtype)
    return torch.stack([_by_token(w[indices] * b * kept, call.outputs[0], n) for w in weight], -1)


def _derivative(call: Call, P: Directions, n: int, affine: bool) -> dict[int, Tensor] | None:
    """The call's derivative along P, times the output gradients, ``[n, T, K]`` per output; None if it has no forward mode.

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
                _, outs = torch.func.jvp(outputs, primals, tangents)
            except (NotImplementedError, RuntimeError):  # no forward-mode formula on this path, or a custom autograd.Function
                return None
        for i, out in outs.items():
            scores[i].append(_by_token(out * grads[i].to(out.dtype), tags[i], n))
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
