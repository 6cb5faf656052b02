"""``python -m bench fidelity|throughput``: measures, prints a table, and writes JSON with what it was measured on."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import fidelity as fidelity_bench
from bench import machine
from bench import throughput as throughput_bench

app = typer.Typer(help="Benchmarks of adam_ghost.", no_args_is_help=True, add_completion=False)
console = Console()
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
def fidelity(json: Json = None, quick: Annotated[bool, typer.Option(help="One setting, two steps.")] = False) -> None:
    """Every method against the exact Shapley values of the true step (Pearson R / relative L2)."""
    table = Table()
    for name in ("batch, beta2, lr", "step", *fidelity_bench.METHODS, "exact's own error"):
        table.add_column(name, justify="right")
    with Progress(console=console) as progress:
        task = progress.add_task("audited steps", total=2 if quick else len(fidelity_bench.SETTINGS) * len(fidelity_bench.STEPS))
        rows = fidelity_bench.measure(quick, lambda row: progress.advance(task))
    for row in rows:
        cells = (f"{row[m]['r']:.4f} / {row[m]['relative_l2']:.3f}" for m in fidelity_bench.METHODS)
        table.add_row(f"{row['batch']}, {row['beta2']}, {row['lr']}", str(row["step"]), *cells, f"{row['yardstick_error']:.4f}")
    console.print(table)
    _write(json, {"rows": rows})
    if missed := fidelity_bench.shortfalls(rows):
        console.print("secant at w_mid misses R >= 0.999 or relative L2 <= 0.02:", *missed, sep="\n")
        raise typer.Exit(1)
    console.print("secant at w_mid reaches R >= 0.999 and relative L2 <= 0.02 at every audited step from 10 on")


@app.command()
def throughput(
    json: Json = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which every variant takes one step.")] = 15,
    device: str = "cpu",
    gpt2: Annotated[bool, typer.Option(help="GPT-2 124M, T = 1024, bf16 autocast, fused AdamW.")] = False,
    memory: Annotated[bool, typer.Option(help="Also measure the peak memory of each variant.")] = True,
) -> None:
    """Training with attribution against training alone, and against training plus the bare validation pass."""
    setting = throughput_bench.Setting(device=device)
    if gpt2:
        sizes = {"layers": 12, "width": 768, "heads": 12, "context": 1024, "vocabulary": 50304}
        setting = replace(setting, **sizes, autocast=True, fused=True)
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=rounds)
        times = throughput_bench.measure(setting, rounds, lambda k: progress.update(task, completed=k + 1))
    shares = throughput_bench.summary(times)
    peaks = {v: throughput_bench.peak_memory(v, setting) for v in throughput_bench.VARIANTS} if memory else {}
    table = Table(caption=f"r = {setting.val_batch}:{setting.batch} validation:training samples, medians of {rounds} rounds")
    for name in ("", "of plain", "of the bound", "quartiles", "peak memory"):
        table.add_column(name, justify="right")
    for v in throughput_bench.VARIANTS:
        share = shares.get(v, {"of_plain": 1.0})
        low, high = share.get("of_bound_quartiles", (float("nan"),) * 2)
        of_bound = f"{share['of_bound']:.3f}" if "of_bound" in share else ""
        table.add_row(
            v, f"{share['of_plain']:.3f}", of_bound, f"{low:.3f} to {high:.3f}", f"{peaks[v] / 2**20:.0f} MiB" if peaks else ""
        )
    console.print(table)
    _write(json, {"setting": asdict(setting), "rounds": rounds, "shares": shares, "peak_bytes": peaks})


if __name__ == "__main__":
    app()
