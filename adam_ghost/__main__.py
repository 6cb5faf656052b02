"""The command line: ``python -m adam_ghost demo``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="In-run data attribution for Adam and AdamW.", no_args_is_help=True, add_completion=False)


@app.callback()
def main() -> None:
    """In-run data attribution for Adam and AdamW."""


@app.command()
def demo(
    steps: Annotated[int, typer.Option(min=4, help="Optimizer steps.")] = 400,
    samples: Annotated[int, typer.Option(min=64, help="Training samples.")] = 640,
    audits: Annotated[int, typer.Option(min=1, help="Steps in which the exact game is played.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the corpus, the model and the order.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for scores.csv.")] = Path("runs/demo"),
) -> None:
    """Train a small GPT on this machine's own texts, and see which of them helped it with a held-out target."""
    from adam_ghost.demo import display, train
    from adam_ghost.demo.data import load_corpus

    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is not a folder", param_hint="--out")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    corpus = load_corpus(samples, targets=16, length=65, seed=seed)
    console.print(f"{samples} samples of 64 characters: Python's documentation, its sources, and documentation garbled.")
    with display.Display(console) as shown:
        result = train.train(corpus, steps, audits, seed, shown.update)
    share = train.throughput(corpus, rounds=max(5, steps // 10), seed=seed)
    display.show(console, result, corpus, share, train.BATCH)
    display.save(out / "scores.csv", result, corpus)
    console.print(f"All scores: {out / 'scores.csv'}")


if __name__ == "__main__":
    app()
