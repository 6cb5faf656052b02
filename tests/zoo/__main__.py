"""Writes the table of architectures, ``docs/architectures.md``: ``python tests/zoo``.

Every number is of the test of that name: the largest relative difference between a step's scores and single samples' own.
"""

import sys
import warnings
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import pytest  # noqa: E402
from architecture import WAYS  # noqa: E402
from families import EXCEPTIONS, FAMILIES, LIBRARIES  # noqa: E402
from measure import measured  # noqa: E402


def head() -> str:
    libraries = ", ".join(f"{len(families)} of {library}" for library, families in LIBRARIES.items())
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return f"""# Architectures

Written by `python tests/zoo`: tiny configurations of {len(FAMILIES)} model families ({libraries}, the last plain modules), in
float64 with {versions}. In each, one step's scores were compared with the scores of single samples, computed alone: the number
is the relative difference of all scores. All parameters are covered by layer calls in every one of them. Batch norms are frozen.
"""


def table(library: str) -> str:
    lines = [
        f"\n## {library}\n\n",
        f"| family | model | {' | '.join(f'`{way}`' for way in WAYS)} |\n",
        f"|---|---|{'---|' * len(WAYS)}\n",
    ]
    return "".join([*lines, *(row(name) for name in LIBRARIES[library])])


def row(name: str) -> str:
    found = []
    for way in WAYS:
        if way not in FAMILIES[name].ways:
            found.append("-")
            continue
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got, want = measured(name, way, patch)
        found.append(f"{float((got - want).norm() / want.norm()):.0e}")
    return f"| {name} | `{FAMILIES[name].model}` | {' | '.join(found)} |\n"


def exceptions() -> str:
    return "\n## Exceptions\n\n" + "".join(f"* {name}: {why}.\n" for name, why in EXCEPTIONS.items())


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    page = "".join([head(), *map(table, LIBRARIES), exceptions()])
    (HERE.parent.parent / "docs" / "architectures.md").write_text(page)
