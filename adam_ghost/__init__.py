"""In-run data attribution for Adam and AdamW: what each training sample did to a validation target, while training."""

from pathlib import Path
from typing import Any

_root = Path(__file__).resolve().parent.parent
_checkout = (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir()
if _checkout:
    # in a checkout `adam_ghost.kernels` is the repository's top-level kernels/; a wheel holds it inside the package
    __path__.append(str(_root))

from adam_ghost.attribute import attribute
from adam_ghost.gram import gram
from adam_ghost.inrun import InRun
from adam_ghost.layer_cache import LayerCache
from adam_ghost.shapley import ShapleyValues, exact_shapley
from adam_ghost.state import AdamState

__all__ = [
    "AdamState",
    "InRun",
    "LayerCache",
    "LedgerWriter",
    "ShapleyValues",
    "attribute",
    "exact_shapley",
    "gram",
    "open_ledger",
]


def __getattr__(name: str) -> Any:
    # the ledger's libraries are optional
    if name == "open_ledger":
        from adam_ghost.ledger.reader import open_ledger

        return open_ledger
    if name == "LedgerWriter":
        from adam_ghost.ledger.writer import LedgerWriter

        return LedgerWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
