"""Ops on tensors: schemas, fakes, and the one place where an implementation is chosen.

``triton`` runs CUDA tensors (and CPU tensors under ``TRITON_INTERPRET=1``), ``cpp`` is the compiled extension where it was
built, ``reference`` is always there. The choice is by device and shape; ``impl=`` overrides it for tests and benchmarks.
"""

from torch import Tensor


def wgrad_score(a: Tensor, b: Tensor, P: Tensor, *, offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight gradient and scores of a linear layer in one go."""
    import torch

    a, b = a.to(P.dtype), b.to(P.dtype)
    if offsets is None:
        G = b.mT @ a
    else:
        G = torch.stack([b[s:e].mT @ a[s:e] for s, e in zip(offsets.tolist(), offsets.tolist()[1:])])
    return G.sum(0), G.flatten(1) @ P.flatten(1).mT
