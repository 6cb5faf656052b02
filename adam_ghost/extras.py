"""What to install where an optional library is missing."""

import importlib.metadata
import re

from adam_ghost import checkout


def how_to_install(extra: str) -> str:
    """A command line that brings what ``extra`` of pyproject.toml needs."""
    if checkout is not None:
        return f"pip install -e '{checkout}[{extra}]'"
    # no registry holds this package: its requirements are named one by one
    wanted = [r for r in importlib.metadata.requires("adam-ghost") or () if re.search(rf"extra == .{extra}.", r)]
    return " ".join(["pip install", *(f"'{r.split(';')[0].strip()}'" for r in wanted)])
