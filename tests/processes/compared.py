"""Results of several processes against those of one."""

import numpy as np


def joined(found: list[dict], what: str = "scores") -> dict:
    return {i: s for rank in found for i, s in rank[what].items()}


def distance(found: dict, expected: dict) -> float:
    """Relative, of what is known by id."""
    assert found.keys() == expected.keys()
    x, y = (np.array([each[i] for i in sorted(expected)]) for each in (found, expected))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
