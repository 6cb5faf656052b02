"""In-run data attribution for Adam and AdamW: what each training sample did to a validation target, while training."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).resolve().parent.parent
_checkout = (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir()
if _checkout:
    # in a checkout `adam_ghost.kernels` is the repository's top-level kernels/; a wheel holds it inside the package
    __path__.append(str(_root))

if TYPE_CHECKING:
    from adam_ghost.attribution import attribute
    from adam_ghost.capture.declared import keeps_samples_apart
    from adam_ghost.inrun import InRun
    from adam_ghost.layer_cache import LayerCache
    from adam_ghost.ledger.reader import open_ledger
    from adam_ghost.ledger.writer import LedgerWriter
    from adam_ghost.optim.adam import AdamState
    from adam_ghost.pairwise import gram
    from adam_ghost.shapley import ShapleyValues, exact_shapley

__all__ = [
    "AdamState",
    "InRun",
    "LayerCache",
    "LedgerWriter",
    "ShapleyValues",
    "attribute",
    "exact_shapley",
    "gram",
    "keeps_samples_apart",
    "open_ledger",
]

# loaded when they are asked for: who reads a ledger needs no PyTorch, and who trains needs no ledger's libraries
_HOMES = {
    "AdamState": "optim.adam",
    "InRun": "inrun",
    "LayerCache": "layer_cache",
    "LedgerWriter": "ledger.writer",
    "ShapleyValues": "shapley",
    "attribute": "attribution",
    "exact_shapley": "shapley",
    "gram": "pairwise",
    "keeps_samples_apart": "capture.declared",
    "open_ledger": "ledger.reader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found
