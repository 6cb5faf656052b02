"""Draws samples by their running scores, while the run that scores them goes on."""

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from adam_ghost.ledger.ids import normalise
from adam_ghost.use.read import ranked

if TYPE_CHECKING:
    from adam_ghost.use.read import Source


class AttributionSampler(Sampler[int]):
    """Places in a data set, drawn with replacement, the more helpful samples more often.

        sampler = AttributionSampler(run, range(len(dataset)), generator=torch.Generator().manual_seed(0))
        loader = DataLoader(dataset, batch_size=32, sampler=sampler)

    Each draw takes sample ``i`` with probability ``floor / N + (1 - floor) * w_i / sum(w)``, where ``w = exp(strength * z)`` and
    ``z`` is its mean standardised score so far, 0 (its steps' mean) where it has none yet. Scores are read anew every ``refresh``
    draws, for which the host waits for the device.

    The draws follow from the scores and the generator alone. Where several processes train, each draws by the scores of the samples
    that it has had itself; give each process's generator a seed of its own.

    Args:
        scores: an ``InRun`` that goes on, what its ``scores()`` returned, or a ledger, open or its folder.
        ids: of the samples, by their places in the data set, as the loop gives them to ``run.batch``. ``N`` of them.
        floor: the share of the draws that takes all alike, above 0 and at most 1: nobody is met less often than that.
        strength: what a standard deviation above the steps' mean is worth, as a logarithm; 0 draws all alike.
        refresh: draws between two readings of the scores.
        num_samples: draws in an epoch; ``N``, if None.
        target: which of ``K`` validation losses.
        generator: of torch, on the CPU; one of a random seed, if None.

    Raises:
        TypeError: an id is something else than an integer or a string.
        ValueError: no ids, an id twice, ``floor``, ``strength``, ``refresh`` or ``num_samples`` out of its range. While drawing,
            what reading the scores raises.
    """

    def __init__(
        self,
        scores: "Source",
        ids: Sequence[Hashable] | Tensor,
        *,
        floor: float = 0.2,
        strength: float = 1.0,
        refresh: int = 1024,
        num_samples: int | None = None,
        target: int = 0,
        generator: torch.Generator | None = None,
    ):
        self._places: dict[Hashable, int] = {i: place for place, i in enumerate(normalise(ids))}
        if not self._places or len(self._places) < len(ids):
            raise ValueError(f"ids must be one for each sample, all different, got {len(ids)}, {len(self._places)} different")
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be above 0 and at most 1, got {floor}")
        if strength < 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        num_samples = len(self._places) if num_samples is None else num_samples
        for name, number in (("refresh", refresh), ("num_samples", num_samples)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.scores, self.target = scores, target
        self.floor, self.strength, self.refresh, self.num_samples = floor, strength, refresh, num_samples
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.generator = generator
        self._drawn: list[int] = []  # of this epoch
        self._given = 0  # how many of them were
        self._resumes = False  # whether the next epoch is the rest of a saved one

    def __len__(self) -> int:
        return self.num_samples

    def probabilities(self) -> Tensor:
        """``[N]``, float64: of each sample in one draw, by its scores so far."""
        N = len(self._places)
        z = torch.zeros(N, dtype=torch.float64)
        for i, value in ranked(self.scores, "standardized", self.target, None):
            if i in self._places:
                z[self._places[i]] = value
        return self.floor / N + (1 - self.floor) * (self.strength * z).softmax(0)

    def __iter__(self) -> Iterator[int]:
        """A new epoch, or the rest of the one that ``load_state_dict`` was given."""
        if not self._resumes:
            self._drawn, self._given = [], 0
        self._resumes = False
        while self._given < self.num_samples:
            if self._given == len(self._drawn):
                self._drawn += self._draw(min(self.refresh, self.num_samples - self._given))
            self._given += 1
            yield self._drawn[self._given - 1]

    def _draw(self, number: int) -> list[int]:
        edges = self.probabilities().cumsum(0)  # torch.multinomial takes 2^24 samples at most
        at = torch.rand(number, dtype=torch.float64, generator=self.generator) * edges[-1]
        return torch.searchsorted(edges, at, right=True).clamp(max=len(edges) - 1).tolist()

    def state_dict(self, trained: int | None = None) -> dict[str, Any]:
        """What it takes to go on from here, beside the run's own ``state_dict()``; ``torch.load(weights_only=True)`` takes it.

        Args:
            trained: samples of this epoch that were trained on, which differs from what was drawn where a loader's workers draw
                ahead: what they have drawn comes again, the same. None: all that were drawn.

        Raises:
            ValueError: ``trained`` is more than was drawn.
        """
        given = self._given if trained is None else trained
        if not 0 <= given <= self._given:
            raise ValueError(f"trained must be at most what this epoch has drawn, {self._given}, got {trained}")
        ahead = torch.tensor(self._drawn[given:], dtype=torch.int64)
        return {"given": given, "ahead": ahead, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch is the rest of the saved one, of a sampler with the same arguments.

        Raises:
            ValueError: ``state`` is something else.
        """
        if not isinstance(state, dict) or set(state) != {"given", "ahead", "generator"}:
            what = f"the keys {sorted(map(str, state))}" if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must be what AttributionSampler.state_dict() returned, got {what}")
        self.generator.set_state(state["generator"].cpu())
        self._given = state["given"]
        self._drawn = [-1] * self._given + state["ahead"].tolist()  # what was trained on does not come again
        self._resumes = self._given < self.num_samples
