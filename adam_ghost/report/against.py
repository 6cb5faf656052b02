"""Another run's ledger beside this one: whose ranks agree, who changed places, and the groups of both."""

from typing import Any

from adam_ghost.ledger.compare import compare
from adam_ghost.ledger.reader import LedgerReader
from adam_ghost.report import charts

_DOTS = 1200
_MOVERS = 10
_TEXT = 200  # characters
_NAMES = {"total": "sum of scores", "standardized": "standardised score"}


def set_against(a: LedgerReader, b: LedgerReader | None, target: int, value: str) -> dict[str, Any] | None:
    """What the page says of ``b``; None where there is no other ledger, or it has no such target."""
    if b is None or target not in b.targets:
        return None
    found = compare(a, b, k=_MOVERS, target=target, value=value)
    drawn = found.values[found.values[:, 0].argsort()[charts.spread(found.both, _DOTS)]]
    series = {"name": "samples", "x": drawn[:, 0].tolist(), "y": drawn[:, 1].tolist()}
    said = {"sample": lambda x: str(x), "text": lambda x: x and x[:_TEXT]}
    movers = [{name: said.get(name, lambda x: x)(x) for name, x in row.items()} for row in found.movers]
    return {
        "folder": b.folder.name,
        "both": found.both,
        "only_here": found.only_a,
        "only_there": found.only_b,
        "correlation": found.rank_correlation,
        "movers": movers,
        "groups": found.groups,
        "chart": charts.chart("dots", f"{_NAMES[value]}, this run", f"{_NAMES[value]}, the other run", [series]),
    }
