"""Whether lists hold the very same objects: what is asked of hundreds of parameters in every step, in no Python of its own."""

from collections.abc import Sequence
from operator import is_
from typing import Any


def same(found: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(found) == len(before) and all(map(is_, found, before))
