"""Without an extra, what needs it says which line brings it; what is read from files runs nothing."""

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import adam_ghost
from adam_ghost import extras

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(adam_ghost.__file__).parent


def without(*missing, code):
    """Runs ``code`` in an interpreter in which ``missing`` cannot be imported."""
    hide = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in missing)
    return subprocess.run([sys.executable, "-c", hide + code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_line_names_this_checkout_and_an_extra_that_it_has():
    for extra in ("ledger", "triton"):
        folder, named = re.fullmatch(r"pip install -e '(.+)\[(\w+)\]'", extras.how_to_install(extra)).groups()
        assert named == extra and Path(folder) == ROOT
        assert re.search(rf"^{extra} = \[", (Path(folder) / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_an_installed_package_names_its_requirements_and_never_itself(monkeypatch):
    requires = ["numpy", "pyarrow>=15; extra == 'ledger'", "duckdb>=1.1; extra == 'ledger'"]
    requires += ["jinja2>=3; extra == 'other'"]
    monkeypatch.setattr(extras, "checkout", None)
    monkeypatch.setattr(extras.importlib.metadata, "requires", lambda name: requires)
    assert extras.how_to_install("ledger") == "pip install 'pyarrow>=15' 'duckdb>=1.1'"


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        ("duckdb", "from adam_ghost.cli import app; app(['top', '.'])", "ledger"),
        ("pyarrow", "from adam_ghost.cli import app; app(['audit', '.'])", "ledger"),
        ("pyarrow", "import adam_ghost; adam_ghost.LedgerWriter('x')", "ledger"),
    ],
)
def test_missing(missing, code, extra):
    done = without(missing, code=code)
    assert done.returncode == 1 and extras.how_to_install(extra) in done.stderr, done.stderr
    assert "adam_ghost" in done.stderr or "adam-ghost" in done.stderr


def test_the_demo_without_extras(tmp_path):
    arguments = ["demo", "--steps", "4", "--samples", "64", "--audits", "1", "--out", str(tmp_path)]
    done = without("pyarrow", "duckdb", code=f"from adam_ghost.cli import app; app({arguments!r})")
    assert done.returncode == 0, done.stderr
    assert extras.how_to_install("ledger") in done.stdout.replace("\n", "")


def test_the_demos_scores_run_nothing_in_a_spreadsheet(tmp_path):
    from adam_ghost.demo.data import Corpus
    from adam_ghost.demo.display import save
    from adam_ghost.demo.train import Result

    texts = ["=cmd|' /C calc'!A0", "@SUM(1)", "plain", ""]
    corpus = Corpus(*(texts if f in ("texts", "sources", "domains") else None for f in Corpus.__dataclass_fields__))
    counts = np.array([1, 2, 3, 4])
    result = Result(*[-1.0 * counts] * 5, counts, audits=[], windows=[], target_loss=(0, 0), booked=(0, 0))
    save(tmp_path / "scores.csv", result, corpus)
    with (tmp_path / "scores.csv").open(newline="", encoding="utf-8") as f:
        rows = {row["id"]: row for row in csv.DictReader(f)}
    assert [rows[str(i)]["text"] for i in range(4)] == ["'" + texts[0], "'" + texts[1], "plain", ""]
    assert rows["0"]["source"] == "'" + texts[0] and float(rows["1"]["by_step"]) == -2


def test_no_file_is_read_as_code():
    """Pickles run what they say: the package reads none, and calls ``torch.load`` with ``weights_only=True`` only."""
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                calls += 1
                assert {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True", path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load", "pd.read_pickle", "eval", "exec"):
                raise AssertionError(f"{path} calls {ast.unparse(node.func)}")
    assert calls
