"""What is booked of a step: the one definition, which a run fills and the ledger's tables are made of."""

from dataclasses import dataclass


@dataclass
class Audit:
    """One step's scores against its exact Shapley values."""

    r: float  # Pearson's correlation
    relative_l2: float
    loss_drop: list[float]  # per target, U(B): what the batch's step really took off the validation loss


@dataclass
class StepRecord:
    """The books of one attributed step; lists are per target."""

    step: int
    samples: int
    lr: list[float]  # per parameter group
    val_loss: list[float]  # where the validation gradient was last taken
    refreshed: bool  # whether that was in this step
    score_sum: list[float]
    total: list[float]  # < P , g(B) >, what the scores must add up to
    history: list[float]  # what momentum and weight decay took off the validation loss, to first order
    coverage: float  # share of the parameters with a gradient that the scores explain
    skipped: bool  # the gradients were not finite and the optimizer did not step: no scores
    seconds: float  # of the host, spent on attribution around this step
    audit: Audit | None = None
    window: int | None = None  # the first step of the window that the scores come from; None: they are the step's own
    horizon: int | None = None  # how many steps after this one their validation loss was looked at
