"""Heads inside of a loss: functions of hidden rows and a weight that never show the logits, nor keep them.

Each is recorded as what its rows add to its results, by a definition that runs in chunks of rows: no more logits are in memory
than the function itself would have.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.capture.declared import FOLLOWED, visible
from adam_ghost.capture.names import functions

_CHUNK = 1024  # rows whose logits are held at once

# by the function that a mode is told of: the function of the same arguments, the first of which are hidden rows [N, d] and the
# weight [V, d], whose i-th result [N] adds up to the i-th result of the head, or is it
HEADS: dict[Callable, Callable[..., Any]] = {}


def declare_heads() -> None:
    """Has the heads of libraries that are loaded recorded."""
    for module, name, rows in _LIBRARIES:
        function = getattr(sys.modules.get(module), name, None)
        if function is not None and function not in FOLLOWED:
            HEADS[visible(function)] = rows
            FOLLOWED.add(function)


def _in_chunks(rows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``rows`` of all ``tensors [N, ...]``, a chunk after the other."""
    return torch.cat([rows(*chunk) for chunk in zip(*(x.split(_CHUNK) for x in tensors), strict=True)])


def _share(target: Tensor, reduction: str, ignore_index: int, class_weight: Tensor | None) -> Any:
    """What a row's loss is divided by."""
    if reduction != "mean":
        return 1
    if target.is_floating_point():  # probabilities
        return len(target)
    counted = target != ignore_index
    return counted.sum() if class_weight is None else class_weight[target[counted]].sum()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """Of ``torch.nn.functional.linear_cross_entropy``."""
    ignore_index = -100 if ignore_index is None else ignore_index
    of: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "none"}
    losses = _in_chunks(lambda x, y: F.cross_entropy(F.linear(x, linear_weight, linear_bias), y, **of), input, target)
    return losses / _share(target, reduction, ignore_index, weight)


def liger(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: Any = None,
    use_token_scaling: bool = False,
    *_: Any,
    **__: Any,
) -> tuple[Tensor]:
    """Of Liger's ``LigerFusedLinearCrossEntropyFunction``; its other results carry no gradient."""
    of: dict[str, Any] = {
        "weight": ce_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": "none",
    }

    def rows(x: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits, y, **of)
        if lse_square_scale:
            losses = losses + lse_square_scale * torch.where(y == ignore_index, 0.0, torch.logsumexp(logits, -1).square())
        if use_token_scaling:
            losses = losses * torch.exp(-F.cross_entropy(logits.detach(), y, ignore_index=ignore_index, reduction="none"))
        return losses

    return (_in_chunks(rows, _input, target) / _share(target, reduction, ignore_index, ce_weight),)


def trl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, ...]:
    """Of TRL's ``ChunkedLogProbFunction``: the targets' log-probabilities, and entropies where these are asked for."""

    def rows(x: Tensor, y: Tensor) -> Tensor:
        logits = logit_scale * F.linear(x, weight, bias)
        if final_logit_softcapping is not None:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        log_p = (logits / temperature).log_softmax(-1)
        found = [log_p.gather(1, y.unsqueeze(1)).squeeze(1)]
        if "entropy" in outputs:
            found.append(-(log_p.exp() * log_p).sum(-1))
        return torch.stack(found, 1)

    return _in_chunks(rows, hidden, targets).unbind(1)


_LIBRARIES = (
    ("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", liger),
    ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", trl),
)
HEADS.update({f: linear_cross_entropy for f in functions("F.linear_cross_entropy")})
