"""The first sentence of the page, which can be quoted, and what has to be known about it."""

from collections.abc import Mapping, Sequence
from typing import Any

from adam_ghost.ledger.audits import Audits
from adam_ghost.report.balance import balance

_SHARE = 0.03  # of the samples, who are the most harmful


def how_many(samples: int, most: int) -> int:
    """How many of the samples the sentence counts."""
    return max(1, min(most, round(_SHARE * samples)))


def headline(
    samples: int,
    bottom: int,
    harm: float,
    noise: tuple[float, float],
    by: str,
    steps: Sequence[Mapping[str, Any]],
    name: str,
    audits: Audits,
) -> dict[str, str]:
    """``sentence`` and ``note``.

    Args:
        samples: how many the run has seen.
        bottom: how many of them ``harm`` is the sum of: the lowest by the value ``by``.
        harm: in the validation loss's unit, negative = it rose.
        noise: the middle 95% of ``harm`` over resamplings of the steps.
        steps: those that were booked, as ``balance`` reads them.
        name: of the validation loss.
        audits: the run's own.
    """
    who = f"The {bottom:,} most harmful of {samples:,} samples" if bottom > 1 else f"The most harmful of {samples:,} samples"
    did = f"raised {name} by {-harm:.3g}" if harm < 0 else f"still lowered {name}, by {harm:.3g}"
    ends = sorted(abs(x) for x in noise) if noise[0] * noise[1] > 0 else [-noise[1], -noise[0]]
    picked = "standardised scores" if by == "standardized" else "sums of scores"
    note = (
        f"The 95% interval of that sum over resampled steps is {ends[0]:.3g} to {ends[1]:.3g}. They were picked by their {picked},"
        " chance included: expect less of them in another run."
    )
    if noise[0] * noise[1] <= 0:
        note = f"The interval holds zero: whether they harmed is not known. {note}"
    if audits.failed:
        note = f"{audits.line} {note}"
    if any(s["horizon"] is not None for s in steps):
        return {"sentence": f"{who} {did}, as far as their steps' windows look.", "note": note}
    found = balance(steps)
    if found is None or len(found.step) < 2:
        return {"sentence": f"{who} {did}.", "note": note}
    drop, own = float(found.drop[-1]), float(found.own[-1])
    if drop > 0:
        explained = f"the samples' own steps explain {own / drop:.0%} of its drop of {drop:.3g}"
    else:
        explained = f"in all it rose by {-drop:.3g}"
    return {"sentence": f"{who} {did}; {explained}.", "note": note}
