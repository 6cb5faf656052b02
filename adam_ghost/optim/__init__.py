"""What an optimizer will do to any gradient, without doing it; an optimizer is a file. Knows no layers."""

# each registers itself
from adam_ghost.optim import (  # noqa: F401
    adafactor,
    adagrad,
    adamax,
    lion,
    nadam,
    quantized,
    radam,
    rmsprop,
    schedule_free,
    sgd,
)
from adam_ghost.optim.adam import AdamState
from adam_ghost.optim.muon import MuonState
from adam_ghost.optim.protocol import OptState, edits_gradients, register
from adam_ghost.optim.read import Optimizers, listed, read_optimizer, settings
from adam_ghost.optim.several import Several

__all__ = [
    "AdamState",
    "MuonState",
    "OptState",
    "Optimizers",
    "Several",
    "edits_gradients",
    "listed",
    "read_optimizer",
    "register",
    "settings",
]
