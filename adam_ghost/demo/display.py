"""What the demo shows: progress while it trains, then tables; plain lines where the output is not a terminal."""

import csv
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from adam_ghost.demo.data import Corpus
from adam_ghost.demo.train import METHODS, Progress, Result, Throughput, auroc, summarize
from adam_ghost.ledger.formulas import neutral

_VALUES = ("window_standardized", "by_window", "standardized", "by_step", "summed_loss")  # of a Result: columns of scores.csv


class Display:
    """Shows the training's progress in place on a terminal, and in a few lines elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        self._live = Live(console=console, transient=False, auto_refresh=False)
        self._lines: tuple[str, int] = ("", 0)  # of which run, and its last fifth that was shown

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, p: Progress) -> None:
        fifth = p.schedule, p.step * 5 // p.steps
        if self.console.is_terminal:
            head = f"{p.schedule}: step {p.step}/{p.steps}   loss {p.loss:.3f}   {p.steps_per_second:.1f} steps/s with attribution"
            table = _table("domain", "samples", "mean score", "standard error")
            for name, (mean, error, n) in p.by_domain.items():
                table.add_row(name, str(n), f"{mean:+.6f}", f"{error:.6f}")
            self._live.update(Group(Text(head), table), refresh=True)
        elif fifth != self._lines and fifth[1]:
            self._lines = fifth
            running = ", ".join(f"{name} {mean:+.5f}" for name, (mean, _, n) in p.by_domain.items() if n)
            head = f"{p.schedule}: step {p.step}/{p.steps}: loss {p.loss:.3f}, {p.steps_per_second:.1f} steps/s"
            self.console.print("; ".join(filter(None, (head, running))))


def _table(first: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _domains(result: Result, corpus: Corpus) -> Table:
    table = _table("domain", "samples", "one step", "windows", "summed training loss")
    columns = [summarize(x, corpus) for x in (result.by_step, result.by_window, result.summed_loss)]
    for name, (_, _, n) in columns[0].items():
        cells = [f"{mean:+.5f} ± {error:.5f}" for mean, error, _ in (c[name] for c in columns[:2])]
        mean, error, _ = columns[2][name]
        table.add_row(name, str(n), *cells, f"{mean:.3f} ± {error:.3f}")
    return table


def _rankings(result: Result, corpus: Corpus) -> dict[str, float]:
    """The AUROC of each way to rank texts."""
    ways = {
        "windows, standardised within steps": result.window_standardized,
        "windows, summed over steps": result.by_window,
        "one step, standardised within steps": result.standardized,
        "one step, summed over steps": result.by_step,
        "summed training loss": -result.summed_loss,
    }
    return {name: auroc(values, corpus) for name, values in ways.items()}


def _extremes(result: Result, corpus: Corpus, order: np.ndarray) -> Table:
    table = Table()
    numbers = ("id", "windows", "one step")
    for name in (*numbers, "domain", "source", "text"):
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            overflow="fold" if name == "text" else "ellipsis",
        )
    for i in order.tolist():
        # any text may hold the terminal's markup: Text shows it as it is
        excerpt = Text(" ".join(corpus.texts[i].split())[:60])
        scores = f"{result.window_standardized[i]:+.3f}", f"{result.standardized[i]:+.3f}"
        table.add_row(str(i), *scores, corpus.domains[i], Text(corpus.sources[i]), excerpt)
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


def _windows(result: Result) -> Table:
    table = _table("first step", "steps to the end", "R", "relative L2")
    for a in result.windows:
        table.add_row(str(a.step), str(a.ahead + 1), f"{a.r:.3f}", f"{a.relative_l2:.2f}")
    return table


def _completeness(result: Result) -> Table:
    table = _table("step", "sum of scores", "loss without the batch - with it", "difference")
    for a in result.audits:
        off = abs(a.score_sum - a.loss_drop) / abs(a.loss_drop)
        table.add_row(str(a.step), f"{a.score_sum:+.6f}", f"{a.loss_drop:+.6f}", f"{off:.2%}")
    return table


def show(console: Console, result: Result, corpus: Corpus, share: Throughput, batch: int) -> None:
    """The tables at the end."""
    order = _by_credit(result)
    before, after = result.target_loss
    own, history = result.booked
    rankings = _rankings(result, corpus)
    console.print(f"\nThe target's loss went from {before:.3f} to {after:.3f}. Scores are in its unit; positive = helped.")
    console.print(
        f"Of the drop of {before - after:.3f}, {own:+.3f} is booked to the samples' own steps and {history:+.3f} to momentum and"
        " weight decay, which carry on what earlier samples did. Windows follow them there.\n"
    )
    found = _table("AUROC, clean prose above corrupted, by", "")
    for name, value in rankings.items():
        found.add_row(name, f"{value:.3f}")
    parts = {
        "Score by domain: sum over all steps, mean over samples ± standard error": _domains(result, corpus),
        "Which ranking tells the corrupted texts": found,
        "Most helpful samples, by windows, standardised within steps": _extremes(result, corpus, order[:5]),
        "Most harmful samples, by windows, standardised within steps": _extremes(result, corpus, order[::-1][:5]),
        "Audit of one step: against its exact Shapley values, Pearson R / relative L2 error": _audit(result),
        "Audit of windows: against leaving samples out of the first step and training on to the window's end": _windows(result),
        "Completeness: one step's scores add up to what its batch changed, against the step of history alone": _completeness(
            result
        ),
    }
    for title, table in parts.items():
        console.print(Text(f"\n{title}", style="bold"))
        console.print(table)
    r = f"{len(corpus.target)}:{batch}"
    console.print(
        "Windows look up to the end of the training, so the last ones see less far.\n"
        f"Throughput with one-step scores of every step: {share.of_plain:.0%} of the same loop without, {share.of_bound:.0%} of"
        f" that with a bare validation pass (validation : training = {r})"
    )


def take_away(result: Result, corpus: Corpus) -> str:
    """The last line."""
    rankings = _rankings(result, corpus)
    best = max(rankings, key=lambda name: rankings[name])
    exact = np.median([a.agreement["secant/midpoint"][0] for a in result.audits])
    line = f"one-step scores say what a text did in its step (R = {exact:.4f} with the exact values)"
    if result.windows:
        line += f", windows what it did to the training after it (R = {np.median([a.r for a in result.windows]):.2f})"
    return f"Take-away: {line}; the corrupted texts are told best by: {best} (AUROC {rankings[best]:.3f})."


def _by_credit(result: Result) -> np.ndarray:
    """The samples that were met, the most helpful first, by windows as the default ranking has it."""
    value = result.window_standardized
    met = np.flatnonzero(~np.isnan(value))
    return met[np.argsort(-value[met], kind="stable")]


def save(path: Path, result: Result, corpus: Corpus) -> None:
    """One line per sample, most helpful first; a text that a spreadsheet would run as a formula gets an apostrophe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["id", "domain", "source", "steps", *_VALUES, "text"])
        for i in _by_credit(result).tolist():
            row = [f"{getattr(result, name)[i]:.8g}" for name in _VALUES]
            source, text = neutral(corpus.sources[i]), neutral(corpus.texts[i])
            writer.writerow([i, corpus.domains[i], source, result.met[i], *row, text])
