"""What an optimizer will do to any gradient, without doing it; an optimizer is a file. Knows no layers."""

from adam_ghost.optim import adafactor, adagrad, adam, adamax, muon, nadam, radam, rmsprop, sgd  # noqa: F401  they register
from adam_ghost.optim.protocol import OptState, register
from adam_ghost.optim.read import Optimizers, listed, read_optimizer

__all__ = ["OptState", "Optimizers", "listed", "read_optimizer", "register"]
