"""What the demo shows: progress while it trains, then tables; plain lines where the output is not a terminal."""

import csv
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adam_ghost.demo.data import Corpus
from adam_ghost.demo.train import METHODS, Progress, Result
from adam_ghost.ledger.formulas import neutral


class Display:
    """Shows the training's progress in place on a terminal, and in a few lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self._live = Live(console=console, transient=False, auto_refresh=False)
        self._lines = 0

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, p: Progress) -> None:
        if self.console.is_terminal:
            head = Text(f"step {p.step}/{p.steps}   loss {p.loss:.3f}   {p.steps_per_second:.1f} steps/s with attribution")
            self._live.update(Group(head, _domains(p.by_domain)), refresh=True)
        elif p.step * 5 // p.steps > self._lines:
            self._lines = p.step * 5 // p.steps
            running = ", ".join(f"{name} {mean:+.5f}" for name, (mean, _, _) in p.by_domain.items())
            self.console.print(f"step {p.step}/{p.steps}: loss {p.loss:.3f}, {p.steps_per_second:.1f} steps/s; {running}")


def _domains(by_domain: dict[str, tuple[float, float, int]]) -> Table:
    table = Table()
    table.add_column("domain")
    for name in ("samples", "mean score", "standard error"):
        table.add_column(name, justify="right")
    for name, (mean, error, n) in by_domain.items():
        table.add_row(name, str(n), f"{mean:+.6f}", f"{error:.6f}")
    return table


def _extremes(result: Result, corpus: Corpus, order: np.ndarray) -> Table:
    table = Table()
    for name in ("id", "score", "domain", "source", "text"):
        table.add_column(
            name,
            justify="right" if name in ("id", "score") else "left",
            overflow="fold" if name == "text" else "ellipsis",
        )
    for k in order:
        i = result.scores.ids[k]
        # any text may hold the terminal's markup: Text shows it as it is
        excerpt = Text(" ".join(corpus.texts[i].split())[:72])
        table.add_row(str(i), f"{result.scores.total[k]:+.5f}", corpus.domains[i], Text(corpus.sources[i]), excerpt)
    return table


def _audit(result: Result) -> Table:
    table = Table()
    table.add_column("step", justify="right")
    for name in METHODS:
        table.add_column(name, justify="right")
    table.add_column("exact values' own error", justify="right")
    for a in result.audits:
        cells = (f"{r:.4f} / {error:.3f}" for r, error in a.agreement.values())
        table.add_row(str(a.step), *cells, f"{a.sampling_error:.3f}")
    return table


def _completeness(result: Result) -> Table:
    table = Table()
    for name in ("step", "sum of scores", "the batch's own drop", "difference"):
        table.add_column(name, justify="right")
    for a in result.audits:
        off = abs(a.score_sum - a.loss_drop) / abs(a.loss_drop)
        table.add_row(str(a.step), f"{a.score_sum:+.6f}", f"{a.loss_drop:+.6f}", f"{off:.2%}")
    return table


def show(console: Console, result: Result, corpus: Corpus, share: float, batch: int) -> None:
    """The tables at the end."""
    order = np.argsort(-result.scores.total, kind="stable")
    before, after = result.target_loss
    own, history = result.booked
    console.print(f"\nThe target's loss went from {before:.3f} to {after:.3f}. Scores are in its unit; positive = helped.")
    console.print(
        f"Of the drop of {before - after:.3f}, {own:+.3f} is booked to the samples' own steps and {history:+.3f} to momentum and"
        " weight decay, which carry on what earlier samples did.\n"
    )
    parts = {
        "Score by domain: sum over all steps, mean over samples": _domains(result.by_domain),
        "Most helpful samples": _extremes(result, corpus, order[:5]),
        "Most harmful samples": _extremes(result, corpus, order[::-1][:5]),
        "Audit: against the exact Shapley values of the step, Pearson R / relative L2 error": _audit(result),
        "Completeness: do scores add up to what the batch took off, against the step without it?": _completeness(result),
    }
    for title, table in parts.items():
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)
    console.print()
    for name, value in result.auroc.items():
        console.print(f"AUROC, clean prose above corrupted, by {name}: {value:.3f}")
    r = f"{len(corpus.target)}:{batch}"
    console.print(f"Throughput with attribution of every step: {share:.0%} of the same loop without (validation : training = {r})")


def save(path: Path, result: Result, corpus: Corpus) -> None:
    """One line per sample, most helpful first; a text that a spreadsheet would run as a formula gets an apostrophe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["id", "domain", "source", "steps", "score", "standardized", "text"])
        for k in np.argsort(-result.scores.total, kind="stable"):
            i = result.scores.ids[k]
            row = [f"{result.scores.total[k]:.8g}", f"{result.scores.standardized[k]:.6g}"]
            source, text = neutral(corpus.sources[i]), neutral(corpus.texts[i])
            writer.writerow([i, corpus.domains[i], source, result.scores.steps[k], *row, text])
