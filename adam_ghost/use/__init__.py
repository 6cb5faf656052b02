"""What to do with scores: which samples to keep, how often to draw whom, and choosing within a step."""

from adam_ghost.use.pruning import keep
from adam_ghost.use.sampler import AttributionSampler
from adam_ghost.use.selecting import Selection, choose, reweigh, select, weigh
from adam_ghost.use.weighing import GroupWeight, Weights, weights

__all__ = [
    "AttributionSampler",
    "GroupWeight",
    "Selection",
    "Weights",
    "choose",
    "keep",
    "reweigh",
    "select",
    "weigh",
    "weights",
]
