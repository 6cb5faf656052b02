"""Results of several processes against those of one."""

import numpy as np
from faults import thin
from loops import train
from ranks import Ranks


def joined(found: list[dict], what: str = "scores") -> dict:
    return {i: s for rank in found for i, s in rank[what].items()}


def distance(found: dict, expected: dict) -> float:
    """Relative, of what is known by id."""
    assert found.keys() == expected.keys()
    x, y = (np.array([each[i] for i in sorted(expected)]) for each in (found, expected))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def check_training(pair: Ranks, how: str, case: dict) -> None:
    """The processes' scores and books are those of one process, their weights those of a training without scores to the bit.

    In lookahead they are so to rounding: another product forms the linear layers' gradients.
    """
    rounding = 1e-12 if case["schedule"] == "lookahead" else 0
    found, plain = pair.run(train, how, **case), pair.run(train, how, **case | {"schedule": None})
    expected = train("one", **{k: v for k, v in case.items() if k not in ("wrapper", "inner")})
    assert distance(joined(found), expected["scores"]) < 1e-12
    assert distance(joined(found, "standardized"), expected["standardized"]) < 1e-9
    for mine in found:
        for what in ("sums", "totals", "val_loss"):
            np.testing.assert_allclose(mine[what], expected[what], rtol=1e-10, atol=1e-13)
        for w, x in zip(mine["weights"], plain[0]["weights"], strict=True):
            np.testing.assert_allclose(w, x, rtol=rounding, atol=rounding)


def check_thin_layer(pair: Ranks, how: str, clip: float | None) -> None:
    found = [s for mine in pair.run(thin, how, (4, 2), clip) for s in mine]
    expected = np.array(thin("one", (4, 2), clip))
    assert np.linalg.norm(found - expected) < 1e-12 * np.linalg.norm(expected)
