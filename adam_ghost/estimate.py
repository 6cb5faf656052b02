"""What attribution will cost, on paper: a decoder's operations, bytes moved and bytes held, of one device.

The shares of plain training's speed need no clock, only ratios of counts; the seconds assume that products reach ``EFFICIENCY``
of a device's peak. No run of these sizes was measured; ``tests/test_estimate.py`` holds the shares against what was measured
on a CPU.
"""

import math
from typing import NamedTuple

SCHEDULES = ("midpoint", "gauss", "lookahead", "window", "window, cheap")
EFFICIENCY = 0.4
KEPT = 4  # bytes of an element of weights, gradients, moments and directions
STATE = 4 * KEPT  # of a parameter in training: itself, its gradient, two moments


class Device(NamedTuple):
    flops: float  # per second, of products
    bandwidth: float  # bytes per second
    memory: float  # bytes


DEVICES = {
    "a100": Device(312e12, 2.0e12, 80e9),
    "h100": Device(990e12, 3.35e12, 80e9),
    "h200": Device(990e12, 4.8e12, 141e9),
    "b200": Device(2250e12, 8e12, 180e9),
    "l40s": Device(362e12, 0.86e12, 48e9),
    "4090": Device(165e12, 1.0e12, 24e9),
}


class Job(NamedTuple):
    """A decoder of ``layers`` blocks of ``width``, and a step of it."""

    layers: int = 12
    width: int = 768
    vocabulary: int = 50257
    tokens: int = 1024  # of a sample
    samples: int = 16  # of a step
    validation: int = 1  # samples of the validation batch
    targets: int = 1
    itemsize: int = 2  # bytes of an activation
    window: int = 32
    ahead: int = 32
    every: int = 1  # steps, or windows
    refresh: int = 1

    @property
    def matrices(self) -> int:
        """Elements of the weights of all products."""
        return 12 * self.layers * self.width**2 + self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        return self.matrices + self.tokens * self.width  # positions; the head is the embedding

    @property
    def linear(self) -> float:
        """Operations of the products with weights in a forward pass of the step's batch."""
        return 2.0 * self.matrices * self.samples * self.tokens

    @property
    def forward(self) -> float:
        return self.linear + 4.0 * self.layers * self.width * self.tokens**2 * self.samples

    @property
    def activations(self) -> float:
        """Bytes that go into and come out of all layers."""
        return self.itemsize * self.samples * self.tokens * (self.layers * 16 * self.width + self.vocabulary)


class Estimate(NamedTuple):
    """Of one step, on average over all steps."""

    schedule: str
    share: float  # of plain training's speed
    seconds: float
    held: float  # bytes beside plain training's
    fits: bool
    every: int  # with which the share is .9


def operations(
    schedule: str, forward: float, validation: float, contraction: float, spread: float, window: int, ahead: int
) -> float:
    """What one attributed step takes beside the step itself; of windows, on average over their steps, each window swept.

    Args:
        forward: operations of a forward pass of the step's batch.
        validation: of a validation gradient.
        contraction: of all layers' outputs with directions in place of weights.
        spread: of weighing every sample's gradient while it is formed.
    """
    if schedule == "lookahead":
        return validation + spread
    if not schedule.startswith("window"):
        return (2 if schedule == "gauss" else 1) * validation + contraction
    # again without weight gradients, and contracted; then the feedback: a pass, or a quarter of the batch three times forward
    cheap = "cheap" in schedule
    feedback = (3 * forward + 2 * forward) / 4 if cheap else 3 * forward
    again = 2 * forward + contraction
    scale = 0 if cheap else forward  # which steps that are not scored do not tell otherwise
    return (validation + window * again + (window + ahead - 1) * feedback + ahead * scale) / window


def held(schedule: str, job: Job) -> float:
    """Bytes beside plain training's."""
    directions = KEPT * job.parameters * (1 + job.targets)  # other weights, and P in the validation gradients' place
    if schedule in ("midpoint", "gauss"):
        return directions + job.activations
    if schedule == "lookahead":
        return directions
    steps = job.window + job.ahead
    states = 2 * round(steps**0.5)  # those kept, and those of the stretch that is swept
    return directions + KEPT * job.parameters * (steps + 3 * states + 3)


def estimate(job: Job, device: Device) -> list[Estimate]:
    """One ``Estimate`` per schedule, plain training first.

    Raises ValueError naming what is not a positive integer.
    """
    for name, value in job._asdict().items():
        if value < (0 if name == "ahead" else 1):
            raise ValueError(f"{name} must be positive, got {value}")
    flops = EFFICIENCY * device.flops
    plain = 3 * job.forward / flops + 7 * KEPT * job.parameters / device.bandwidth
    needed = STATE * job.parameters + job.activations
    found = [Estimate("plain", 1.0, plain, 0.0, needed <= device.memory, 1)]
    for schedule in SCHEDULES:
        windows = schedule.startswith("window")
        validation = (1 + 2 * job.targets) * job.forward * job.validation / job.samples / (1 if windows else job.refresh)
        spread = 2.0 * job.matrices * job.samples
        counted = operations(
            schedule, job.forward, validation, job.targets * job.linear, job.targets * spread, job.window, job.ahead
        )
        # other weights and then P, of weights, moments and gradients, and sums; a window's adjoint does the like in each step
        moved = 12 * KEPT * job.parameters * job.targets
        added = counted / flops + moved / device.bandwidth
        share = plain / (plain + added / job.every)
        more = held(schedule, job)
        found.append(Estimate(schedule, share, plain / share, more, needed + more <= device.memory, math.ceil(9 * added / plain)))
    return found
