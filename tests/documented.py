"""The code of README and of the documentation, as a reader meets it: a page's blocks one after another."""

import ast
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from toys.muon_and_adam import MuonAndAdam

import adam_ghost

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$", re.M | re.S)
# said in the text, where readers see it, in the line before the block
_LEFT_OUT = re.compile(r"\*Not run by the tests: .{10,}\*\.?$")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    run: bool  # whether the page does not say why it is not


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for m in _FENCE.finditer(text):
        before = text[: m.start()].rstrip().rsplit("\n", 1)[-1]
        line = text[: m.start("code")].count("\n") + 1
        found.append(Block(page, line, m["language"], m["code"], not _LEFT_OUT.search(before)))
    return found


def cells(notebook: Path) -> list[str]:
    """The code of a notebook, cell by cell; outputs are not kept."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in found), f"{notebook.name}: clear its outputs"
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def surroundings() -> dict:
    """What a loop in the documentation takes for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(24, 5), torch.randint(0, 3, (24,))
    loader = [(list(range(i, i + 4)), x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    criterion = nn.CrossEntropyLoss()
    found = {"adam_ghost": adam_ghost, "torch": torch, "nn": nn, "F": nn.functional, "model": model, "optimizer": optimizer}
    found |= {"criterion": criterion, "x_val": x, "y_val": y, "loader": loader, "val_loss": lambda: criterion(model(x), y)}
    matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    return found | {"matrices": matrices, "rest": rest, "MuonAndAdam": MuonAndAdam}


def execute(block: Block, namespace: dict) -> None:
    """Runs a block of Python; a traceback shows the page and its line."""
    exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), namespace)


def texts_of(*folders: Path) -> list[str]:
    """Every string in the sources, with `…` for what is filled in."""
    found = []
    for path in (p for folder in folders for p in folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str, texts: list[str]) -> bool:
    """Whether a text holds the parts of ``message`` between its `…`, in their order."""
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.S)
    return any(pattern.search(text) for text in texts)
