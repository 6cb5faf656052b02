"""In-run data attribution for Adam and AdamW: what each training sample did to a validation target, while training."""

from pathlib import Path

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

__all__ = ["AdamState", "InRun", "LayerCache", "ShapleyValues", "attribute", "exact_shapley", "gram"]
