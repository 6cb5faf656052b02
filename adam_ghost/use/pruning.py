"""Which samples to train on again."""

from collections.abc import Hashable
from typing import TYPE_CHECKING

from adam_ghost.use.read import ranked

if TYPE_CHECKING:
    from adam_ghost.use.read import Source


def keep(
    scores: "Source",
    fraction: float,
    *,
    value: str = "standardized",
    target: int = 0,
    steps: tuple[int, int] | None = None,
) -> list[Hashable]:
    """The ids of the most helpful ``fraction`` of the samples that were scored, the most helpful first.

    A sample that was never scored is not among them: nothing is known of it. What a score foretells is one sample's part in a
    training on all; compare a training on what is kept with one on as many random samples (docs/using-scores.md).

    Args:
        scores: an ``InRun``, what its ``scores()`` returned, or a ledger, open or its folder.
        fraction: above 0, at most 1; of the number of scored samples, rounded, and at least one.
        value: ``standardized``, the mean of the scores standardised within their steps, or ``total``, their sum.
        target: which of ``K`` validation losses.
        steps: the first and the last step that count, both included; only a ledger remembers single steps.

    Returns:
        Ids as the loop gave them to ``run.batch``. Equal values keep the order of first appearance, in a ledger that of the ids.

    Raises:
        TypeError: ``scores`` is nothing that has scores.
        ValueError: ``fraction``, ``value`` or ``target`` is out of its range, nothing was scored, ``steps`` without a ledger.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    found = ranked(scores, value, target, steps)
    if not found:
        raise ValueError("scores hold no sample: nothing was attributed yet")
    return [i for i, _ in found[: max(1, round(fraction * len(found)))]]
