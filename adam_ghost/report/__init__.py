"""One self-contained HTML page about a run, from its ledger."""

from adam_ghost.report.write import write_report

__all__ = ["write_report"]
