"""A warning carries the package's name and points to the user's line, whatever lies between."""

import warnings

import torch

import adam_ghost.warn
from adam_ghost.warn import warn


def test_points_to_the_users_line():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    optimizer.register_step_pre_hook(compiled_into_the_package())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [str(w.message) for w in caught] == ["adam_ghost: it is late"]
    assert caught[0].filename == __file__


def compiled_into_the_package():
    """A hook that looks like the package's own code."""
    found = {"warn": warn}
    exec(compile("def hook(*args):\n    warn('it is late')", adam_ghost.warn.__file__, "exec"), found)
    return found["hook"]
