"""What the benchmarks compute of their samples."""

from statistics import fmean, stdev

import torch
from torch import Tensor

# Student's t for a two-sided 95% interval, by degrees of freedom
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def correlation(a: Tensor, b: Tensor, ranks: bool = False) -> float:
    """Pearson's, or Spearman's."""
    if ranks:
        a, b = (x.argsort().argsort() for x in (a, b))
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """In the Euclidean norm."""
    return float((estimate - truth).norm() / truth.norm())


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95% interval (nan for a single value)."""
    if len(values) < 2:
        return fmean(values), float("nan")
    return fmean(values), _T.get(len(values) - 1, 2.0) * stdev(values) / len(values) ** 0.5


def auroc(scores: Tensor, bad: Tensor) -> float:
    """How well low ``scores`` tell the ``bad`` from the others, ties counting half."""
    high, low = scores[~bad][:, None], scores[bad][None]
    return float((high > low).double().mean() + (high == low).double().mean() / 2)


def precision(scores: Tensor, bad: Tensor) -> float:
    """Of the lowest ``scores``, as many as are ``bad``: the share that is."""
    return float(bad[scores.argsort()[: int(bad.sum())]].double().mean())
