"""How much values would have differed in a run of other steps: the bootstrap."""

import numpy as np

_KEYS = 4096  # columns that are resampled at a time, for the memory's sake


def resample(
    block: np.ndarray, key: np.ndarray, x: np.ndarray, n: np.ndarray | None, blocks: int, keys: int, draws: int
) -> np.ndarray:
    """Sums by key, or means where ``n`` is given, in ``draws`` resamplings of the run's blocks of steps: ``[draws, keys]``.

    A mean is NaN where none of the key's blocks was drawn.

    Args:
        block, key: to which of ``blocks`` and of ``keys`` each addend belongs, ``[rows]``.
        x: the addends, ``[rows]``.
        n: of how many scores each is the sum, ``[rows]``.
    """
    generator = np.random.default_rng(0)
    weights = np.stack([np.bincount(generator.integers(blocks, size=blocks), minlength=blocks) for _ in range(draws)])
    weights = weights.astype(np.float64)  # [draws, blocks]
    drawn = np.empty((draws, keys))
    order = np.argsort(key, kind="stable")
    block, key, x = block[order], key[order], x[order]
    n = n[order] if n is not None else None
    for first in range(0, keys, _KEYS):
        width = min(_KEYS, keys - first)
        part = slice(*np.searchsorted(key, [first, first + width]))
        place = block[part] * width + key[part] - first
        sums = np.bincount(place, x[part], blocks * width).reshape(blocks, width)
        drawn[:, first : first + width] = weights @ sums
        if n is not None:
            counts = np.bincount(place, n[part], blocks * width).reshape(blocks, width)
            scores = weights @ counts
            drawn[:, first : first + width] /= np.where(scores > 0, scores, np.nan)
    return drawn


def middle(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle 95% of ``[draws, keys]``, of those that are numbers: from and to, ``[keys]``."""
    if not drawn.size:
        low, high = np.empty((2, drawn.shape[1]))
    elif np.isnan(drawn).any():
        low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    else:
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high
