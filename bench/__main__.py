"""``python -m bench``: measures, prints a table, and writes JSON with what it was measured on."""

import json
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from bench import books as books_bench
from bench import compile as compile_bench
from bench import feedback as feedback_bench
from bench import fidelity as fidelity_bench
from bench import host as host_bench
from bench import kernels as kernels_bench
from bench import launches as launches_bench
from bench import ledger as ledger_bench
from bench import machine
from bench import operations as operations_bench
from bench import ops as ops_bench
from bench import optimizers as optimizers_bench
from bench import predictions as predictions_bench
from bench import sass as sass_bench
from bench import scaling as scaling_bench
from bench import schedule as schedule_bench
from bench import throughput as throughput_bench
from bench import uses as uses_bench
from bench.evidence import measure as evidence_bench
from bench.evidence import page, pictures
from bench.evidence.studies import STUDIES

app = typer.Typer(help="Benchmarks of adam_ghost.", no_args_is_help=True, add_completion=False)
console = Console(width=None if sys.stdout.isatty() else 160)
Json = Annotated[Path | None, typer.Option("--json", help="Where to write the results.")]


@app.callback()
def main() -> None:
    """Benchmarks of adam_ghost."""


def _write(path: Path | None, results: Any) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine.header(), **results}, indent=1) + "\n")
        console.print(f"written: {path}")


@app.command()
def fidelity(
    json: Json = None,
    quick: Annotated[bool, typer.Option(help="One setting, two steps.")] = False,
    device: str = "cpu",
    optimizer: Annotated[list[str] | None, typer.Option(help="Others than AdamW, by name, or 'all'.")] = None,
    costs: Annotated[
        bool, typer.Option(help="Only what the optimizers in --json cost, on a quiet machine, written over there.")
    ] = False,
) -> None:
    """Every method against the exact Shapley values of the true step (Pearson R / relative L2)."""
    if costs:
        return _costs_again(json)
    if optimizer:
        return _other_optimizers(optimizer, quick, json)
    table = Table()
    for name in ("batch, beta2, lr", "step", *fidelity_bench.METHODS, "exact's own error"):
        table.add_column(name, justify="right")
    with Progress(console=console) as progress:
        task = progress.add_task("audited steps", total=2 if quick else len(fidelity_bench.SETTINGS) * len(fidelity_bench.STEPS))
        rows = fidelity_bench.measure(quick, device, lambda row: progress.advance(task))
    for row in rows:
        cells = (f"{row[m]['r']:.4f} / {row[m]['relative_l2']:.3f}" for m in fidelity_bench.METHODS)
        table.add_row(f"{row['batch']}, {row['beta2']}, {row['lr']}", str(row["step"]), *cells, f"{row['yardstick_error']:.4f}")
    console.print(table)
    _write(json, {"rows": rows})
    for method in ("secant at w_mid", "secant at two points"):
        missed = fidelity_bench.shortfalls(rows, method)
        console.print(f"{method}: R >= 0.999 and relative L2 <= 0.02 at every audited step from 10 on", "except" if missed else "")
        for case in missed:
            console.print(f"  {case}")


def _other_optimizers(names: list[str], quick: bool, json: Path | None) -> None:
    known = list(optimizers_bench.OPTIMIZERS)
    names = known if names == ["all"] else names
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"--optimizer: expected one of {', '.join(known)}, or all, got {unknown[0]!r}")
    table = Table(caption="Windows of 5 steps and 5 ahead against leaving out and training on; cost beside AdamW's")
    for name in ("optimizer", "step", *fidelity_bench.OWN_METHODS, "exact's own error", "window: R", "cost"):
        table.add_column(name, justify="right")
    found = []
    for name in names:
        console.print(f"{name}: {len(found) + 1} of {len(names)}")
        result = fidelity_bench.other_optimizer(name, quick)
        found.append(result)
        window = "-" if result["window_r"] is None else f"{result['window_r']:.4f}"
        for i, row in enumerate(result["rows"]):
            methods = fidelity_bench.OWN_METHODS
            cells = [f"{row[m]['r']:.4f} / {row[m]['relative_l2']:.3f}" if m in row else "refused" for m in methods]
            ends = ["", ""] if i else [window, f"{result['cost']:.1f}"]
            table.add_row("" if i else name, str(row["step"]), *cells, f"{row['yardstick_error']:.4f}", *ends)
    console.print(table)
    _write(json, {"optimizers": found})
    console.print(optimizers_bench.exceptions(found))


def _costs_again(path: Path | None) -> None:
    if path is None or not path.exists():
        raise typer.BadParameter("--costs: give the results of --optimizer all as --json")
    found = json.loads(path.read_text())
    for result in found["optimizers"]:
        result |= fidelity_bench.cost_of(result["optimizer"])
        console.print(f"{result['optimizer']}: {result['cost']:.1f} times AdamW's")
    found["machine_of_costs"] = machine.header()
    path.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def books(json: Json = None) -> None:
    """Whether a run's books close: scores and history against the validation loss's drop, and what came through momentum."""
    cases = [(*run, schedule) for run in books_bench.RUNS for schedule in books_bench.SCHEDULES]
    with Progress(console=console) as progress:
        rows = [books_bench.measure(*case) for case in progress.track(cases, description="trainings")]
    table = Table(
        caption="Shares of the drop: in the samples' own steps (measured: against steps without their batch), and by momentum"
    )
    for name in ("lr, steps", "schedule", "drop", "scores", "history", "sum off by", "own steps", "measured", "momentum"):
        table.add_column(name, justify="left" if name == "schedule" else "right")
    for row in rows:
        numbers = (f"{row[name]:.4f}" for name in ("drop", "scores", "history"))
        shares = (f"{row[name]:.1%}" for name in ("own_steps", "own_steps_measured", "momentum"))
        table.add_row(f"{row['lr']}, {row['steps']}", row["schedule"], *numbers, f"{row['off']:+.2%}", *shares)
    console.print(table)
    _write(json, {"rows": rows})


@app.command()
def evidence(
    quick: Annotated[bool, typer.Option(help="One small cell of each study that is quick, in a minute or two.")] = False,
    study: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(s.name for s in STUDIES)}.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where what is measured is kept, and goes on from.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Where to write the summary.")] = None,
    docs: Annotated[Path | None, typer.Option(help="The folder of evidence.md and its pictures.")] = None,
) -> None:
    """Every claim measured again, peers and baselines beside it, and docs/evidence.md made of it; goes on where it was cut off."""
    if unknown := set(study or []) - {s.name for s in STUDIES}:
        raise typer.BadParameter(f"no such study: {', '.join(sorted(unknown))}", param_hint="--study")
    folder = folder or Path("runs", "evidence-quick" if quick else "evidence")
    whole = not (quick or study)  # only then the committed page
    json = json or folder / "evidence.json"
    docs = docs or (Path("docs") if whole else folder)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("measuring", total=None)
        tell = lambda done, of, what: progress.update(task, completed=done, total=of, description=what or "measuring")  # noqa: E731
        found = evidence_bench.evidence(folder / "cells", quick, study or [], tell)
    _write(json, found)
    docs.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(found, docs)
    (docs / "evidence.md").write_text(page.page(found, drawn), encoding="utf-8")
    console.print(f"written: {docs / 'evidence.md'}" + ("" if drawn else " (no pictures: matplotlib is not installed)"))


@app.command()
def uses(
    json: Json = Path("bench", "results", "uses-cpu.json"),
    docs: Annotated[Path, typer.Option(help="The page whose tables are made of it.")] = Path("docs", "using-scores.md"),
) -> None:
    """What scores are used for: models trained with and without, beside random choices and the loss, five seeds each."""
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("measuring", total=len(uses_bench.SEEDS) * len(uses_bench.USES))
        found = uses_bench.measure(lambda what: progress.update(task, advance=1, description=what))
    _write(json, {"uses": found})
    docs.write_text(uses_bench.page(docs.read_text(encoding="utf-8"), found), encoding="utf-8")
    console.print(f"written: {docs}")


@app.command()
def predictions(json: Json = None) -> None:
    """Variants of what lookahead predicts, against the scores of the true midpoint (medians over settings and steps)."""
    with Progress(console=console) as progress:
        task = progress.add_task("steps", total=len(fidelity_bench.SETTINGS) * (len(fidelity_bench.STEPS) - 1))
        rows = predictions_bench.measure(lambda row: progress.advance(task))
    table = Table(caption="over settings and steps from the tenth on")
    for name in ("validation gradient at, secant at", "R, median", "R, worst", "relative L2, median", "relative L2, worst"):
        table.add_column(name, justify="right")
    for name in predictions_bench.VARIANTS:
        r, error = ([row[name][k] for row in rows] for k in ("r", "relative_l2"))
        table.add_row(name, *(f"{x:.4f}" for x in (median(r), min(r))), *(f"{x:.3f}" for x in (median(error), max(error))))
    console.print(table)
    _write(json, {"rows": rows})


@app.command()
def feedback(json: Json = None) -> None:
    """What windows' feedback is worth by differences of gradients, against double backward, in language models."""
    table = Table(caption="errors of products, then R / relative L2 of a window's credit")
    for name in ("width, autocast, steps before", "step of fixed length", "differences", *feedback_bench.WAYS):
        table.add_column(name, justify="right")
    with Progress(console=console) as progress:
        task = progress.add_task("settings", total=len(feedback_bench.SETTINGS))
        rows = feedback_bench.measure(lambda row: progress.advance(task))
    for row in rows:
        errors = (f"{row['products'][k]:.4f}" for k in ("fixed", "differences"))
        cells = (f"{row[way]['r']:.4f} / {row[way]['relative_l2']:.3f}" for way in feedback_bench.WAYS)
        table.add_row(f"{row['width']}, {row['precision']}, {row['start']}", *errors, *cells)
    console.print(table)
    _write(json, {"rows": rows})


@app.command()
def throughput(
    json: Json = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every variant takes one step.")] = 15,
    device: str = "cpu",
    gpt2: Annotated[bool, typer.Option(help="GPT-2 124M, T = 1024, bf16 autocast, fused AdamW.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the model; without midpoint, which cannot record it.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure the peak memory of each variant.")] = True,
    windows: Annotated[bool, typer.Option(help="Also a cycle of each kind of windows: some ten minutes on a CPU.")] = False,
    experts: Annotated[int, typer.Option(help="Then the same with so many experts, of as many operations to a token.")] = 0,
) -> None:
    """Training with attribution against training alone, and against training plus the bare validation pass."""
    setting = throughput_bench.Setting(device=device, compiled=compile)
    if gpt2:
        sizes = {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50304}
        setting = replace(setting, **sizes, autocast=True, fused=True)
    found = _throughput(setting, rounds, memory, windows)
    if experts:
        found["with_experts"] = _throughput(replace(setting, experts=experts), rounds, memory, windows)
    _write(json, found)


@app.command()
def operations(
    json: Json = None,
    experts: Annotated[int, typer.Option(min=2, help="Of the mixture that the dense model is set beside.")] = 8,
) -> None:
    """Operations of a step's products, counted: of a dense model and of a mixture of experts, two to a token."""
    setting = operations_bench.SETTING
    rows = operations_bench.measure(setting, experts)
    caption = f"r = {setting.val_batch}:{setting.batch}; the bound: training and the bare validation pass"
    table = Table("experts", "", "GFLOP", "of the bound", caption=caption)
    for row in rows:
        table.add_row(str(row["experts"]), row["variant"], f"{row['operations'] / 1e9:.2f}", f"{row['of_bound']:.3f}")
    console.print(table)
    _write(json, {"setting": asdict(setting), "rows": rows})


def _throughput(setting: throughput_bench.Setting, rounds: int, memory: bool, windows: bool) -> dict[str, Any]:
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=rounds)
        times = throughput_bench.measure(setting, rounds, lambda k: progress.update(task, completed=k + 1))
    shares = throughput_bench.summary(times)
    peaks = {v: throughput_bench.peak_memory(v, setting) for v in setting.variants} if memory else {}
    what = f"{setting.experts} experts, two to a token, " if setting.experts else ""
    caption = f"{what}r = {setting.val_batch}:{setting.batch} validation:training samples, medians of {rounds} rounds"
    table = Table(caption=caption)
    for name in ("", "of plain", "of the bound", "quartiles", "peak memory"):
        table.add_column(name, justify="right")
    for v in setting.variants:
        share = shares.get(v, {"of_plain": 1.0})
        of_bound = f"{share['of_bound']:.3f}" if "of_bound" in share else ""
        quartiles = "{:.3f} to {:.3f}".format(*share["of_bound_quartiles"]) if "of_bound_quartiles" in share else ""
        table.add_row(v, f"{share['of_plain']:.3f}", of_bound, quartiles, f"{peaks[v] / 2**20:.0f} MiB" if peaks else "")
    of_windows = throughput_bench.measure_windows(setting) if windows else {}
    for v, found in of_windows.items():
        table.add_row(v, f"{found['of_plain']:.3f}", "", "", f"{found['peak_bytes'] / 2**20:.0f} MiB")
    console.print(table)
    return {"setting": asdict(setting), "rounds": rounds, "shares": shares, "peak_bytes": peaks, "windows": of_windows}


@app.command()
def compile(json: Json = None) -> None:
    """Registers, shared memory and matrix instructions of every Triton kernel, compiled for chips that need not be here."""
    running = {arch: compile_bench.start(arch) for arch in compile_bench.CHIPS}
    found = {arch: compile_bench.finish(process) for arch, process in running.items()}
    for arch, kernels in found.items():
        instruction = compile_bench.MATRIX[arch]
        table = Table(title=f"sm_{arch}")
        for name in ("kernel", "case", "registers", "spilled bytes", "shared, kB", "warps", instruction, "bulk copies"):
            table.add_column(name, justify="left" if name in ("kernel", "case") else "right")
        for k in kernels:
            numbers = (k["registers"], k["spills"], f"{k['shared'] / 1024:.0f}", k["warps"], k[instruction], k["bulk copies"])
            case = re.sub(r"torch\.|Config|[(),]|\b\w+=(False|None)", "", k["case"])
            table.add_row(k["kernel"], " ".join(case.split()), *map(str, numbers))
        console.print(table)
    _write(json, {"kernels": found})


@app.command()
def launches(json: Json = None, lines: Annotated[int, typer.Option(help="Source lines told per variant.")] = 8) -> None:
    """What one step of GPT-2 124M asks of a GPU, counted on meta tensors: launches, bytes, copies that block, unlike operands."""
    found = launches_bench.measure()
    bound = found["bound"]
    table = Table(caption="fused AdamW, bf16 autocast, 16 samples of 1,024 tokens; bytes of tensors as large as a parameter")
    for name in (
        "",
        "launches",
        "beyond the bound",
        "budget",
        "bytes per parameter beyond",
        "budget",
        "copies that block",
        "kernels' operands",
    ):
        table.add_column(name, justify="right" if name else "left")
    for v, row in found.items():
        extra, allowed = row["launches"] - bound["launches"], launches_bench.budget(v, bound["launches"])
        moved = row["bytes_per_parameter"] - bound["bytes_per_parameter"]
        most = launches_bench.BYTES if v == "lookahead" else ""
        cells = (row["launches"], extra, "" if allowed is None else allowed - bound["launches"], f"{moved:.1f}", most)
        table.add_row(v, *map(str, cells), str(sum(row["waits"].values())), ", ".join(f"{n} {k}" for k, n in row["dtypes"].items()))
    console.print(table)
    for v in ("lookahead", "midpoint", "thin layer"):
        beyond = {k: n - bound["by_line"].get(k, [0])[0] for k, (n, _) in found[v]["by_line"].items()}
        top = sorted(beyond.items(), key=lambda x: -x[1])[:lines]
        console.print(f"{v}:", ", ".join(f"{n} {k}" for k, n in top))
    _write(json, {"variants": found})


@app.command()
def host(json: Json = None, rounds: Annotated[int, typer.Option(min=3, help="Steps of each variant.")] = 40) -> None:
    """The host's time in one step, as a ratio to that of training and a bare validation pass."""
    found = host_bench.measure(rounds)
    table = Table(caption=f"{host_bench.LAYERS} layers of width {host_bench.WIDTH}, one thread, medians of {rounds} steps")
    for name in ("", "ms", "of the bound", "budget", "function calls"):
        table.add_column(name, justify="right" if name else "left")
    for v, row in found.items():
        allowed = str(host_bench.BUDGET.get(v, ""))
        table.add_row(v, f"{row['ms']:.2f}", f"{row['of_bound']:.2f}", allowed, f"{row['calls']:,}")
    console.print(table)
    _write(json, {"variants": found})


@app.command()
def sass(json: Json = None) -> None:
    """Machine code for sm_90: what a sample's end costs the matrix kernels, and how wide the extension's kernels write."""
    from adam_ghost import extension

    kernels = [k for k in compile_bench.finish(compile_bench.start(90)) if "barriers per end" in k]
    names = ("barriers per step", "barriers per end", "fences per end", "fetches per end", "chain", "registers", "shared", "blocks")
    table = Table(caption="budget of wgrad_score with one direction: 4 barriers, no fence and no fetch at a sample's end")
    for name in ("kernel", "case", *names):
        table.add_column(name, justify="left" if name in ("kernel", "case") else "right")
    for k in kernels:
        k["blocks"] = sass_bench.blocks(k["registers"], k["shared"], k["warps"])
        table.add_row(k["kernel"], re.sub(r"torch\.|Config|[(),]|\b\w+=(False|None)", "", k["case"]), *(str(k[n]) for n in names))
    console.print(table)
    compiled = sass_bench.of_extension(extension.C.__file__) if extension.built["cuda"] else {}
    table = Table(caption="budget: 128-bit stores" if compiled else "the extension was built without CUDA")
    for name in ("csrc", "store bits", "load bits", "wide stores", "barriers", "registers", "blocks"):
        table.add_column(name, justify="left" if name == "csrc" else "right")
    for name, row in compiled.items():
        table.add_row(name, *map(str, row.values()))
    console.print(table)
    _write(json, {"matrix": kernels, "csrc": compiled})


@app.command()
def schedule(json: Json = None) -> None:
    """DRAM traffic of the matrix kernels' order of work by a model of the level-2 cache, and their balance."""
    rows = schedule_bench.measure()
    table = Table(caption=f"{schedule_bench.PROGRAMS} multiprocessors, {schedule_bench.CACHE / 1e6:.0f} MB of cache")
    for name in ("op", "shape", "least, MB", "DRAM over least", "budget", "balance", "budget "):
        table.add_column(name, justify="left" if name in ("op", "shape") else "right")
    for row in rows:
        cells = f"{row['least_mb']:.0f}", f"{row['dram']:.2f}", str(schedule_bench.DRAM), f"{row['balance']:.3f}"
        table.add_row(row["op"], row["shape"], *cells, str(schedule_bench.BALANCE))
    console.print(table)
    _write(json, {"rows": rows})


@app.command()
def scaling(json: Json = None) -> None:
    """Bytes moved, bytes held and operations of a sharded step's attribution, beside the plain step's: docs/scaling.md's table."""
    rows = scaling_bench.measure()
    print(scaling_bench.table(rows))
    _write(json, {"rows": rows})


@app.command()
def kernels(json: Json = None) -> None:
    """Every Triton kernel against the library call it competes with; without a GPU, only its floor on an H200."""
    rows = kernels_bench.measure()
    table = Table(caption="bfloat16; floor: the larger of operations over 790 TFLOP/s and bytes over 4.3 TB/s")
    columns = {"op": "op", "shape": "shape", "floor, ms": "floor_ms"}
    if "ms" in rows[0]:
        columns |= {"ms": "ms", "TFLOP/s": "tflop_per_s", "GB/s": "gb_per_s", "against": "against", "ms of that": "library_ms"}
        columns["ratio"] = "ratio"
    for name, key in columns.items():
        table.add_column(name, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(row[key] if isinstance(row[key], str) else f"{row[key]:.3f}" for key in columns.values()))
    console.print(table)
    _write(json, {"rows": rows})


@app.command()
def ops(json: Json = None, device: str = "cpu") -> None:
    """The variance correction and the adjoint against PyTorch's own ops and the copy bandwidth, for 100 million parameters."""
    results = ops_bench.measure(device)
    table = Table(caption=f"{results['elements'] / 1e6:.1f} million parameters, float32")
    for name in results["ops"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in results["ops"]:
        table.add_row(row["op"], *(f"{x:.2f}" for x in list(row.values())[1:]))
    console.print(table)
    small = f"{ops_bench.SMALL} tensors of {ops_bench.SIZE} elements"
    console.print(f"per call for {small}, beyond one tensor of as many elements: {results['overhead_us']:.1f} microseconds")
    _write(json, results)


@app.command()
def ledger(
    json: Json = None,
    rows: Annotated[int, typer.Option(min=1000, help="Scores.")] = 10_000_000,
    samples: Annotated[int, typer.Option(min=1, help="Different samples among them.")] = 1_000_000,
) -> None:
    """What a ledger costs to write, and how soon it answers; each in a process of its own, for its memory."""

    def alone(work: Callable[..., Any], *args: Any) -> Any:
        with ProcessPoolExecutor(1, get_context("spawn")) as own:
            return own.submit(work, *args).result()

    with TemporaryDirectory() as folder:
        written = alone(ledger_bench.write, Path(folder), rows, samples)
        asked = alone(ledger_bench.ask, Path(folder), samples)
    per_row = 1e6 * written["processor_s"] / written["rows"]
    console.print(f"{written['rows']:,} rows, {written['bytes'] / 2**20:.0f} MiB: {per_row:.2f} us of processor per row,")
    console.print(f"of which the training thread waits {1e6 * written['handing_over_s'] / written['rows']:.2f} us")
    for name, seconds in asked.items():
        console.print(f"{name}: {seconds:.2f}" + ("" if name == "peak_memory_mib" else " s"))
    _write(json, {"written": written, "asked": asked})


if __name__ == "__main__":
    app()
