"""In-run data attribution through the optimizer: what each training sample did to a validation target, while training."""

import importlib
import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).resolve().parent.parent
checkout: Path | None = _root if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir() else None
if checkout is not None:
    # in a checkout `adam_ghost.kernels` is the repository's top-level kernels/; a wheel holds it inside the package
    __path__.append(str(checkout))

if TYPE_CHECKING:
    from adam_ghost.attribution import attribute
    from adam_ghost.capture.declared import keeps_samples_apart
    from adam_ghost.inrun import InRun
    from adam_ghost.layer_cache import LayerCache
    from adam_ghost.ledger.describe import describe_samples
    from adam_ghost.ledger.reader import open_ledger
    from adam_ghost.ledger.writer import LedgerWriter
    from adam_ghost.optim.adam import AdamState
    from adam_ghost.pairwise import gram
    from adam_ghost.shapley import ShapleyValues, exact_shapley

    __version__: str

__all__ = [
    "AdamState",
    "InRun",
    "LayerCache",
    "LedgerWriter",
    "ShapleyValues",
    "__version__",
    "attribute",
    "describe_samples",
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
    "describe_samples": "ledger.describe",
    "exact_shapley": "shapley",
    "gram": "pairwise",
    "keeps_samples_apart": "capture.declared",
    "open_ledger": "ledger.reader",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found = _version()
    elif name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    if checkout is None:
        return importlib.metadata.version("adam-ghost")
    # what is installed under the name may be another copy
    found = re.search(r'^version = "(.+)"$', (checkout / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]
