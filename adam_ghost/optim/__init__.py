"""What an optimizer will do to any gradient, without doing it; an optimizer is a file. Knows no layers."""

from adam_ghost.optim import adam  # noqa: F401  registers itself
from adam_ghost.optim.protocol import OptState, read_optimizer, register

__all__ = ["OptState", "read_optimizer", "register"]
