"""Who imports whom: each wing only those before it, and no module itself by any way round."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adam_ghost"
FOUNDATION = {"__init__", "extension", "extras", "same", "warn"}
STAGES = {"capture", "scores", "optim", "processes", "step", "run"}
VERBS = {"layer_cache", "attribution", "pairwise", "shapley", "inrun"}
# what each wing, or module of the top, may import beside itself and the foundation
MAY_IMPORT = {
    "__init__": VERBS | {"capture", "ledger", "optim"},  # on demand, when a public name is asked for
    "extension": {"warn"},
    "extras": set(),
    "same": set(),
    "warn": set(),
    "kernels": set(),
    "capture": set(),
    "scores": {"capture", "kernels"},
    "optim": set(),
    "processes": {"capture"},
    "step": {"capture", "scores", "optim", "processes"},
    "ledger": set(),
    "run": {"capture", "scores", "optim", "processes", "step", "ledger"},
    **{verb: STAGES | VERBS | {"ledger"} for verb in VERBS},
    "report": {"ledger"},
    "use": VERBS | {"ledger", "optim", "run", "step"},
    "integrations": VERBS | {"capture", "ledger", "run", "step", "use"},
    "demo": VERBS | {"ledger", "run"},
    "doctor": set(),
    "estimate": set(),
    "watch": {"ledger"},
    "cli": {"ledger", "report", "demo", "doctor", "estimate", "watch"},
    "__main__": {"cli"},
}
LIGHT = {"numpy", "__future__"}  # what books may need beside the standard library


def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name below ``adam_ghost``."""
    files = {p: p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")}
    files |= {p: p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")}
    return {".".join(name.with_suffix("").parts): ast.parse(p.read_text(encoding="utf-8")) for p, name in files.items()}


MODULES = modules()


def imports(tree: ast.Module) -> set[str]:
    """The full names that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the wing"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def home(name: str) -> str | None:
    """The module of the package that has the imported ``name``; None for what is not of the package."""
    if name.split(".")[0] != "adam_ghost":
        return None
    parts = name.split(".")[1:]
    while parts:
        for found in (".".join(parts), ".".join([*parts, "__init__"])):
            if found in MODULES:
                return found
        parts.pop()
    return "__init__"


GRAPH = {name: {home(x) for x in imports(tree)} - {None, name} for name, tree in MODULES.items()}


def test_every_wing_has_its_place():
    assert {name.split(".")[0] for name in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_those_before_it(name):
    wing = name.split(".")[0]
    wings = {other.split(".")[0] for other in GRAPH[name]}
    assert wings <= MAY_IMPORT[wing] | FOUNDATION | {wing}


def without_types(tree: ast.Module) -> ast.Module:
    """The module as it runs: without what is imported for types alone."""
    body = [x for x in tree.body if not (isinstance(x, ast.If) and isinstance(x.test, ast.Name) and x.test.id == "TYPE_CHECKING")]
    return ast.Module(body, [])


def test_no_module_imports_itself_by_any_way():
    """A package's face (``__init__``) hands out what its modules define, so these may import each other by it."""
    graph = {}
    for name, tree in MODULES.items():
        others = {home(x) for x in imports(without_types(tree))} - {None, name}
        graph[name] = {x for x in others if not x.endswith("__init__")}
    del graph["__init__"]
    while graph:
        leaves = [name for name, others in graph.items() if not others & graph.keys()]
        assert leaves, f"these import each other: {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_books_need_neither_torch_nor_arrow():
    outside = {x.split(".")[0] for x in imports(MODULES["ledger.books"])} - sys.stdlib_module_names - LIGHT
    assert not outside


def test_the_table_of_files_is_the_listing():
    """CONTRIBUTING names every folder and file, and none that is not there."""
    table = re.findall(r"^\| .* \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)[1:]
    named = re.findall(r"`([a-z_]+(?:/|\.py))`", " ".join(table))
    assert len(named) == len(set(named))
    there = {p.name + "/" if p.is_dir() else p.name for p in PACKAGE.iterdir() if p.name[0] != "_" and p.suffix in ("", ".py")}
    assert set(named) == there


def test_no_test_imports_another():
    """What tests share is in modules of helpers."""
    for path in (ROOT / "tests").rglob("*.py"):
        names = imports(ast.parse(path.read_text(encoding="utf-8")))
        assert not [x for x in names if x.split(".")[0].startswith("test_")], path
