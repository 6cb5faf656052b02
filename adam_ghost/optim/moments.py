"""What optimizers of Adam's family share: how their groups are read, and a decaying mean of squared gradients."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from adam_ghost.optim.defined import Elementwise
from adam_ghost.optim.history import raised, typical_gradient
from adam_ghost.optim.one_pass import Slots
from adam_ghost.optim.protocol import number


def adam_scalars(group: Mapping[str, Any], held: Mapping[str, Any]) -> dict[str, Any]:
    """A step's number and a group's options, by the names that Adam gave them."""
    return {
        "t": number(held.get("step", 0)) + 1,
        "lr": number(group["lr"]),
        "beta1": float(group["betas"][0]),
        "beta2": float(group["betas"][1]),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
    }


class Moments(Elementwise):
    """A state of decaying means: of gradients, and by ``beta2`` of their squares."""

    kinds = 2
    slots: ClassVar[Slots | None] = (0, 1, None)

    @staticmethod
    def bounded(s: Any, g: Tensor, share: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return state[0], raised(state[1], g * g, share, 1 - s.beta2, s.beta2)

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        s, (mean, mean_square) = self._rows[p].scalars, self._rows[p].state
        return None if mean_square is None else typical_gradient(mean, mean_square / (1 - s.beta2 ** (s.t - 1)))
