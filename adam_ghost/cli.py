"""The command line: ``adam-ghost`` or ``python -m adam_ghost``."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adam_ghost import __version__
from adam_ghost.extras import how_to_install
from adam_ghost.ledger.audits import MIN_R, find_audits, listed

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # a corpus is a local: rendering one takes minutes
    epilog="Exit codes: 0 done, 1 not found or a check failed, 2 wrong usage.",
)
Folder = Annotated[Path, typer.Argument(help="The run's ledger: what InRun(..., ledger=DIR) wrote.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on standard output.")]
Target = Annotated[int, typer.Option(min=0, help="Which validation loss, where val_loss returned several.")]
Value = Annotated[str, typer.Option(help="standardized (within steps: for finding bad samples) or total (sum over steps).")]
First = Annotated[int, typer.Option("--from", help="First step.")]
Last = Annotated[int | None, typer.Option("--to", help="Last step.")]
Bootstrap = Annotated[int, typer.Option(min=0, help="Resamplings of the steps, for a 95% interval.")]
GroupFile = Annotated[Path | None, typer.Option("--by", help="CSV with the columns sample and group, instead of the ledger's own.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"adam-ghost {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """In-run data attribution through the optimizer: which training samples helped, which harmed, read from a run's ledger."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps.")] = 192,
    samples: Annotated[int, typer.Option(min=64, help="Training samples.")] = 640,
    audits: Annotated[int, typer.Option(min=1, help="Steps in which the exact game is played, at least.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the corpus, the model and the order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, the ledgers and reports.")] = Path("runs/demo"),
) -> None:
    """Train a small GPT on this machine's own texts, and see which of them helped it with a held-out target."""
    from adam_ghost.demo import display, train
    from adam_ghost.demo.data import load_corpus

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is not a folder", param_hint="--out")
    console = _console()
    corpus = load_corpus(samples, targets=16, length=65, seed=seed)
    console.print(f"{samples} samples of 64 characters: Python's documentation, its sources, and documentation garbled.")
    parts = {"ledger": "report.html", "windows": "windows.html"}  # one run by steps, one by windows
    ledgers = train.open_ledger(out / "ledger", corpus), train.open_ledger(out / "windows", corpus)
    with display.Display(console) as shown:
        result = train.train(corpus, steps, audits, seed, shown.update, ledgers)
    share = train.throughput(corpus, rounds=max(5, steps // 10), seed=seed)
    display.show(console, result, corpus, share, train.BATCH)
    display.save(out / "scores.csv", result, corpus)
    console.print(f"All scores: {out / 'scores.csv'}")
    if ledgers[0] is None:
        console.print(Text(f"For ledgers and reports: {how_to_install('ledger')}"))
    else:
        from adam_ghost.report import write_report

        for name, page in parts.items():
            write_report(out / name, out / page, title=f"adam_ghost demo: {'one step' if name == 'ledger' else 'windows'}")
            console.print(f"Ledger: {out / name}   (adam-ghost top {out / name})   Report: {out / page}")
    console.print(Text(display.take_away(result, corpus)))


@app.command()
def top(
    folder: Folder,
    k: Annotated[int, typer.Option("-k", "-n", min=1, help="How many.")] = 10,
    harmful: Annotated[bool, typer.Option(help="The most harmful instead of the most helpful.")] = False,
    value: Value = "standardized",
    target: Target = 0,
    first: First = 0,
    last: Last = None,
    bootstrap: Bootstrap = 0,
    as_json: AsJson = False,
) -> None:
    """The most helpful, or most harmful, samples."""

    def ask(ledger: Any) -> Any:
        found = ledger.top(k, harmful=harmful, target=target, steps=_steps(first, last), value=value, bootstrap=bootstrap)
        return found.to_pylist(), _checks(ledger, target)

    _print_checked(_read(folder, ask), as_json)


@app.command()
def groups(
    folder: Folder,
    by: GroupFile = None,
    value: Value = "total",
    target: Target = 0,
    first: First = 0,
    last: Last = None,
    bootstrap: Bootstrap = 0,
    as_json: AsJson = False,
) -> None:
    """Scores by group: domain, label, source, or whatever samples were described with."""
    mapping = _groups(by)
    steps = _steps(first, last)

    def ask(ledger: Any) -> Any:
        found = ledger.groups(mapping, target=target, steps=steps, value=value, bootstrap=bootstrap).to_pylist()
        if mapping and {row["group"] for row in found} == {"(none)"}:
            known = ledger.sql("SELECT min(sample) AS sample FROM scores")["sample"][0].as_py()
            _fail(f"{by} names none of the ledger's samples, whose ids are such as {known!r}", 2)
        return found, _checks(ledger, target)

    _print_checked(_read(folder, ask), as_json)


@app.command(context_settings={"ignore_unknown_options": True})  # an id may be a negative number
def show(
    folder: Folder,
    sample: Annotated[str, typer.Argument(help="The sample's id.", metavar="ID")],
    target: Target = 0,
    as_json: AsJson = False,
) -> None:
    """Everything about one sample: what it is, its values, and its score in every step it was part of."""
    found = _read(folder, lambda ledger: ledger.show(sample, target))
    description = {k: v for k, v in found.pop("description").items() if k not in ("sample", "image", "tokens") and v is not None}
    steps = found.pop("steps").select(["step", "epoch", "score", "loss"]).to_pylist()
    if as_json:
        _print({**found, **description, "steps": steps}, True)
        return
    console = _console()
    for name, cell in {**found, **description}.items():
        console.print(Text(f"{name}: {_cell(cell)}"))
    _print(steps, False)


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="The page to write; report.html beside DIR's files, if not given.")] = None,
    value: Value = "standardized",
    against: Annotated[Path | None, typer.Option(help="Another run's ledger, to set beside this one.", metavar="OTHER")] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
) -> None:
    """Write one self-contained HTML page: who helped and who harmed, with their noise, what is explained, and what is not."""

    def write(ledger: Any, other: Any = None) -> Path:
        from adam_ghost.report import write_report

        return write_report(ledger, out or folder / "report.html", value=value, against=other, title=title)

    page = _read(folder, lambda a: _read(against, lambda b: write(a, b)) if against else write(a))
    _console().print(Text(f"Report: {page}"))


@app.command()
def audit(
    folder: Folder,
    target: Target = 0,
    minimum: Annotated[float, typer.Option("--min-r", help="Fail if an audited step's correlation is below this.")] = MIN_R,
    largest: Annotated[
        float,
        typer.Option("--max-gap", help="Fail if a step's scores miss more of its gradient than this share."),
    ] = 0.05,
    least: Annotated[
        float, typer.Option("--min-coverage", help="Fail if a step's scores explain a smaller share of the parameters than this.")
    ] = 0.99,
    apart: Annotated[
        float, typer.Option("--max-alone", help="Fail if recorded gradients differ more from those of samples computed alone.")
    ] = 0.001,
    as_json: AsJson = False,
) -> None:
    """Can the scores be trusted: audited steps against their exact Shapley values, and every step's sum against its gradient.

    Two samples of each audited step are computed alone as well, to see whether the recorded gradients are theirs. Where the
    model computes in half precision, --max-alone has to be larger.

    Columns: r and relative_l2, of the scores to the truth; loss_drop, what the batch took off the loss, and off, by what part
    of it score_sum misses it; alone, how far gradients of samples computed alone are from the recorded ones.
    """
    books = "SELECT count(DISTINCT step) AS steps, count(DISTINCT step) FILTER (skipped) AS skipped FROM steps WHERE target = ?"

    def ask(ledger: Any) -> Any:
        from adam_ghost.ledger.gap import find_gap

        found = find_gap(ledger, target)  # which refuses a target that is not there
        return find_audits(ledger, target, minimum), ledger.sql(books, [target]).to_pylist()[0], found

    (audited, bad, verdict), summary, (gap, coverage, line) = _read(folder, ask)
    summary |= {"least_coverage": coverage, "largest_gap": gap}
    if as_json:
        _print({"audited": audited, **summary}, True)
    else:
        _print(audited, False, empty="No step was audited: InRun(..., audit_every=N) does.")
        _print([summary], False)
        for text in (line, verdict):
            _console().print(Text(text))
    reasons = []
    if bad:
        reasons.append(f"the correlation is below {minimum:g} in {listed(bad)}")
    mixed = [row["step"] for row in audited if row["alone"] is not None and not row["alone"] <= apart]
    if mixed:
        reasons.append(
            f"gradients of samples computed alone differ from the recorded ones by more than {apart:g} in {listed(mixed)}"
        )
    if gap is not None and not gap <= largest:
        reasons.append(f"a step's scores miss {gap:.1%} of its gradient, more than {largest:.1%}")
    if coverage is not None and not coverage >= least:
        reasons.append(f"a step's scores explain {coverage:.1%} of the parameters, less than {least:.1%}")
    if reasons:
        _fail("; ".join(reasons), 1)


@app.command()
def watch(
    folder: Folder,
    k: Annotated[int, typer.Option("-k", "-n", min=1, help="How many samples of each end.")] = 5,
    target: Target = 0,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds from one look to the next.")] = 5.0,
    times: Annotated[int | None, typer.Option(min=1, help="How many looks; until Ctrl-C, if not given.")] = None,
) -> None:
    """A live view of a ledger while its run writes it: progress, loss, who helps and who harms, groups."""

    def look(ledger: Any) -> None:
        from adam_ghost.watch import watch

        watch(ledger, _console(), _table, k=k, target=target, every=every, times=times)

    _read(folder, look)


@app.command()
def compare(
    folder: Folder,
    other: Annotated[Path, typer.Argument(help="Another run's ledger.", metavar="OTHER")],
    k: Annotated[int, typer.Option("-k", "-n", min=1, help="How many samples that changed places.")] = 10,
    value: Value = "standardized",
    target: Target = 0,
    as_json: AsJson = False,
) -> None:
    """Two ledgers beside each other: how alike they rank their samples, who changed places most, and their groups."""

    def ask(a: Any, b: Any) -> Any:
        from adam_ghost.ledger.compare import compare

        return compare(a, b, k=k, target=target, value=value)

    found = _read(folder, lambda a: _read(other, lambda b: ask(a, b)))
    if as_json:
        _print({name: x for name, x in found._asdict().items() if name != "values"}, True)
        return
    console = _console()
    console.print(Text(f"{found.both} samples in both, {found.only_a} only in {folder}, {found.only_b} only in {other}."))
    console.print(Text(f"Rank correlation (Spearman) of their {value} values: {found.rank_correlation:.3f}"))
    _print(found.movers, False)
    if found.groups:
        _print(found.groups, False)


@app.command()
def estimate(
    layers: Annotated[int, typer.Option(help="Blocks of a decoder.")] = 12,
    width: Annotated[int, typer.Option(help="Their width.")] = 768,
    vocabulary: Annotated[int, typer.Option(help="Tokens that there are.")] = 50257,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 1024,
    samples: Annotated[int, typer.Option(help="Samples of a step.")] = 16,
    validation: Annotated[int, typer.Option(help="Samples of the validation batch.")] = 1,
    targets: Annotated[int, typer.Option(help="Validation losses.")] = 1,
    window: Annotated[int, typer.Option(help="Steps of a window.")] = 32,
    ahead: Annotated[int, typer.Option(help="Steps that a window looks ahead.")] = 32,
    every: Annotated[int, typer.Option(help="Attribute every that many steps, or windows.")] = 1,
    refresh: Annotated[int, typer.Option(help="Attributed steps from one validation gradient to the next.")] = 1,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l40s or 4090.")] = "h100",
    as_json: AsJson = False,
) -> None:
    """What attribution will cost for a decoder on one GPU: reckoned from operations and bytes, not measured."""
    from adam_ghost import estimate as paper

    if gpu not in paper.DEVICES:
        _fail(f"--gpu must be one of {', '.join(paper.DEVICES)}, got {gpu}", 2)
    sizes = {"layers": layers, "width": width, "vocabulary": vocabulary, "tokens": tokens, "samples": samples}
    job = paper.Job(**sizes, validation=validation, targets=targets, window=window, ahead=ahead, every=every, refresh=refresh)
    try:
        found = paper.estimate(job, paper.DEVICES[gpu])
    except ValueError as error:
        _fail(str(error), 2)
    if as_json:
        _print([row._asdict() for row in found], True)
        return
    _console().print(
        Text(f"{job.parameters / 1e6:.0f} million parameters, {samples * tokens} tokens a step, reckoned for one {gpu}")
    )
    rows = []
    for row in found:
        plain = row.schedule == "plain"
        rows.append(
            {
                "schedule": row.schedule,
                "of plain speed": f"{row.share:.2f}",
                "seconds a step": f"{row.seconds:.3g}",
                "GB more": "" if plain else f"{row.held / 1e9:.1f}",
                "fits": "yes" if row.fits else "no",
                "every for .9": "" if plain else str(row.every),
            }
        )
    _print(rows, False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Which implementations serve on this machine, and why the others do not. Exits with 1 if PyTorch is not supported."""
    from adam_ghost.doctor import examine

    found = [{"part": f.name, "active": f.active, "why": f.why} for f in examine()]
    _print(found, as_json)
    if not found[0]["active"]:
        raise typer.Exit(1)


@app.command()
def export(
    folder: Folder,
    to: Annotated[Path | None, typer.Option("--csv", help="The file to write; standard output, if not given.")] = None,
    every_score: Annotated[bool, typer.Option(help="A line per score, instead of one per sample.")] = False,
    value: Value = "total",
    target: Target = 0,
    raw: Annotated[bool, typer.Option(help="Leave ids as they are that a spreadsheet would run as formulas.")] = False,
) -> None:
    """Write scores as CSV. An id that begins as a formula does gets an apostrophe before it."""

    def write(ledger: Any) -> None:
        from adam_ghost.ledger.export import write_csv

        query = "SELECT * FROM scores ORDER BY step"
        table = ledger.sql(query) if every_score else ledger.totals(target=target, value=value)
        write_csv(table if every_score else table.sort_by([("value", "descending")]), to or sys.stdout.buffer, raw=raw)

    _read(folder, write)


def _read(folder: Path, ask: Callable[[Any], Any]) -> Any:
    """Asks the ledger in ``folder``; what people get wrong ends in one line, not in a traceback."""
    try:
        from adam_ghost.ledger.check import DamagedLedger
        from adam_ghost.ledger.reader import open_ledger
    except ImportError as error:
        _fail(str(error), 1)
    try:
        with open_ledger(folder) as ledger:
            return ask(ledger)
    except KeyError as error:
        _fail(error.args[0], 1)
    except (OSError, ImportError, DamagedLedger) as error:
        _fail(str(error), 1)
    except ValueError as error:
        _fail(str(error), 2)


def _fail(text: str, code: int) -> NoReturn:
    text = "".join(c if c.isprintable() else " " for c in text.removeprefix("adam_ghost: "))
    Console(stderr=True).print(Text(f"adam-ghost: {text}"), soft_wrap=True)
    raise typer.Exit(code)


def _checks(ledger: Any, target: int) -> list[str]:
    """What the run's own checks say of its scores, a line each."""
    from adam_ghost.ledger.gap import find_gap

    return [line for line in (find_gap(ledger, target).line, find_audits(ledger, target).line) if line]


def _print_checked(found: tuple[Any, list[str]], as_json: bool) -> None:
    rows, checks = found
    _print(rows, as_json, empty="No sample was scored in these steps.")
    for line in [] if as_json else checks:
        _console().print(Text(line))


def _steps(first: int, last: int | None) -> tuple[int, int] | None:
    return None if first == 0 and last is None else (first, 2**62 if last is None else last)


def _groups(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    if not path.is_file():
        _fail(f"there is no file {path}", 1)
    found: dict[str, str] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as f:
            lines = csv.DictReader(f)
            if not {"sample", "group"} <= set(lines.fieldnames or ()):
                _fail(f"{path} must have the columns sample and group, it has {', '.join(lines.fieldnames or ())}", 2)
            for row in lines:
                sample, group = row["sample"], row["group"]
                if not group:
                    _fail(f"{path}, line {lines.line_num}: sample {sample!r} has no group", 2)
                if found.setdefault(sample, group) != group:
                    _fail(f"{path}, line {lines.line_num}: sample {sample!r} has two groups, {found[sample]!r} and {group!r}", 2)
    except UnicodeDecodeError as error:
        _fail(f"{path} must be a CSV in UTF-8: {error.reason} at byte {error.start}", 2)
    return found


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _print(rows: Any, as_json: bool, empty: str = "Nothing.") -> None:
    if as_json:
        print(json.dumps(_plain(rows), indent=1))
        return
    if not rows:
        _console().print(empty)
        return
    _console().print(_table(rows))


def _table(rows: list[dict[str, Any]], title: str | None = None) -> Table:
    # columns in which nothing stands are left out
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    table = Table(title=title)
    for name in names:
        number = all(isinstance(row[name], (int, float, type(None))) for row in rows)
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        # data may hold the terminal's markup or control characters: Text shows the one as it is, _cell drops the other
        table.add_row(*(Text(_cell(row[name])) for name in names))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:+.6g}"
    text = "" if value is None else str(value)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= 100 else text[:99] + "…"


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value
