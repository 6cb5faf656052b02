"""docs/optimizers.md says what was measured, and leaves out no optimizer that is known."""

import json
import re
from pathlib import Path

import pytest

from adam_ghost.optim import protocol
from bench.optimizers import OPTIMIZERS, exceptions, table

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "optimizers.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "bench" / "results" / "optimizers-cpu.json").read_text(encoding="utf-8"))["optimizers"]


def test_the_table_is_what_was_measured():
    assert [result["optimizer"] for result in RESULTS] == list(OPTIMIZERS)
    for name, made in (("table", table), ("exceptions", exceptions)):
        (found,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- end of {name} -->", PAGE, re.S)
        assert found == made(RESULTS)


@pytest.mark.parametrize("kind", [reader.kind for reader in protocol._READERS], ids=str)
def test_the_page_names_what_is_known(kind):
    name = kind.split(".")[0] if isinstance(kind, str) else kind.__name__
    assert re.search(rf"\b{name}\b", PAGE)
