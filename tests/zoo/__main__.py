"""Writes the table of architectures, ``docs/architectures.md``: ``python tests/zoo``.

Every number is of the test of that name: the largest relative difference between a step's scores and single samples' own.
"""

import sys
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import FAMILIES  # noqa: E402
from measure import WAYS, measured  # noqa: E402

HEAD = f"""# Architectures

Written by `python tests/zoo`: tiny configurations of {len(FAMILIES)} model families of transformers {transformers.__version__}, in
float64 with torch {torch.__version__}. In each, one step's scores were compared with the scores of single samples, computed alone:
the number is the relative difference of all scores. All parameters are covered by layer calls in every one of them.

| family | model | {" | ".join(f"`{way}`" for way in WAYS)} |
|---|---|{"---|" * len(WAYS)}
"""


def row(name: str) -> str:
    found = []
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, want = measured(name, way, patch)
        found.append(f"{float((got - want).norm() / want.norm()):.0e}")
    return f"| {name} | `{FAMILIES[name].model}` | {' | '.join(found)} |\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    (HERE.parent.parent / "docs" / "architectures.md").write_text(HEAD + "".join(map(row, FAMILIES)))
