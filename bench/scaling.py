"""What attribution adds to a step of ``fully_shard``, on paper: bytes moved and held, and operations, of each process.

Layers are checkpointed: the plain step keeps their inputs and runs them forward again.

The counts of exchanges are those of the real code: ``tests/processes/test_scaling.py`` holds them against what it exchanges.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from adam_ghost import estimate
from adam_ghost.estimate import SCHEDULES

# bytes of an element: weights in passes, gradients as they are added up, everything that an optimizer or we keep
WEIGHT, GRADIENT, KEPT = 2, 4, 4
WINDOW, AHEAD, EVERY = 32, 32, 4  # steps of a window, ahead of it, and of how many windows one is swept
# of one GPU: bfloat16 operations per second in training, bytes per second to others of its machine and beyond, and memory
FLOPS, NEAR, FAR, MEMORY, MACHINE = 400e12, 300e9, 40e9, 80e9, 8
TOKENS, SAMPLES, RATIO = 8192, 2, 1 / 8  # of a process in a step; validation tokens over those


@dataclass
class Model:
    """A decoder's sizes; ``experts`` of which each token takes ``used``."""

    name: str
    layers: int
    d: int
    ff: int
    kv: int
    vocabulary: int
    tied: bool = False
    experts: int = 1
    used: int = 1

    def _layer(self, experts: int) -> int:
        return 2 * self.d * (self.d + self.kv) + 3 * self.d * self.ff * experts + self.d * (2 + self.experts * (self.experts > 1))

    @property
    def unit(self) -> int:
        """Elements of a layer, which ``fully_shard`` gathers at once."""
        return self._layer(self.experts)

    @property
    def root(self) -> int:
        """Elements of what belongs to no layer: embedding, head, last norm."""
        return self.vocabulary * self.d * (1 if self.tied else 2) + self.d

    @property
    def elements(self) -> int:
        return self.layers * self.unit + self.root

    @property
    def active(self) -> int:
        """Elements of matrices that a token meets."""
        return self.layers * self._layer(self.used) + self.vocabulary * self.d

    @property
    def outputs(self) -> int:
        """Elements of all layers' outputs for a token, whose gradients midpoint keeps."""
        return self.layers * (5 * self.d + 2 * self.kv + (2 * self.ff + self.d) * self.used) + self.vocabulary + self.d


MODELS = (
    Model("1B", 16, 2048, 8192, 512, 128256, tied=True),
    Model("7B", 32, 4096, 11008, 4096, 32000),
    Model("70B", 80, 8192, 28672, 1024, 32000),
    Model("8x7B, 2 experts of 8", 32, 4096, 14336, 1024, 32000, experts=8, used=2),
)


class Exchanged(NamedTuple):
    """Elements that are exchanged, by what becomes of them: weights and directions are gathered, gradients added up."""

    weights: int = 0
    directions: int = 0
    gradients: int = 0

    def __add__(self, other: Any) -> "Exchanged":
        return Exchanged(*(x + y for x, y in zip(self, other, strict=True)))

    def times(self, n: int) -> "Exchanged":
        return Exchanged(*(n * x for x in self))

    def bytes(self, weight: int = WEIGHT, gradient: int = GRADIENT, kept: int = KEPT) -> int:
        return self.weights * weight + self.directions * kept + self.gradients * gradient


def plain(N: int, root: int) -> Exchanged:
    """A pass forward and backward of ``N`` elements, of which ``root`` stay gathered between the two."""
    return Exchanged(weights=2 * N - root, gradients=N)


def validation(N: int, root: int, K: int = 1) -> Exchanged:
    """Each further loss goes backward again, where the root's weights are gone."""
    return plain(N, root) + Exchanged(weights=N, gradients=N).times(K - 1)


def added(schedule: str, N: int, root: int, K: int = 1, micro: int = 1) -> Exchanged:
    """What a step's attribution exchanges beyond the step, ``N`` elements of which ``root`` belong to no layer."""
    if schedule == "lookahead":
        return validation(N, root, K) + Exchanged(directions=K * N).times(micro)
    passes = 2 if schedule == "gauss" else 1
    return validation(N, root, K).times(passes) + Exchanged(weights=N, directions=K * N)


def swept(N: int, root: int, unit: int, scored: int, ahead: int, K: int = 1, differences: bool = True) -> Exchanged:
    """What a whole window's sweep exchanges: scored steps run again, and the feedback of all but the first of them all.

    Where a gradient is taken as far as the model's output alone, ``fully_shard`` fetches the last unit ahead, for nothing.
    """
    again = Exchanged(weights=2 * N - root, directions=K * N)
    feedbacks = scored + ahead - 1
    found = validation(N, root, K) + again.times(scored)
    if differences:  # a pass for each, and one forward that tells a step's scale where the step is not scored
        return found + plain(N, root).times(K * feedbacks) + Exchanged(weights=N + unit).times(ahead)
    # gauss-newton goes forward twice, to the output and back into the loss twice, and backward once
    return found + Exchanged(weights=3 * N + 2 * unit + root, gradients=N).times(K * feedbacks)


def moved(schedule: str, model: Model) -> float:
    """Bytes, whole, of a step's attribution; of windows, of their sweeps over all steps."""
    N, root = model.elements, model.root
    if not schedule.startswith("window"):
        return added(schedule, N, root).bytes()
    sweep = swept(N, root, model.unit, WINDOW, AHEAD, differences="cheap" not in schedule)
    return sweep.bytes() / (WINDOW * EVERY)


def operations(schedule: str, model: Model) -> float:
    """Of a process, beyond the step's ``8 * active * tokens``."""
    forward = 2.0 * model.active * TOKENS
    validation, spread = 3 * forward * RATIO, 2.0 * model.active * SAMPLES
    found = estimate.operations(schedule, forward, validation, forward, spread, WINDOW, AHEAD)
    return found / EVERY if schedule.startswith("window") else found


def held(schedule: str, model: Model, W: int) -> float:
    """Bytes of a process beyond the step's: its parts, and whole directions of the unit in work and of the next."""
    N = model.elements
    parts = 2 * KEPT * N / W  # the weights as they were, and P in the validation gradient's place
    units = KEPT * (model.root + 2 * model.unit)
    if schedule in ("midpoint", "gauss"):
        return parts + units + 2 * WEIGHT * TOKENS * model.outputs  # what went into layers, and the gradients at what came out
    if schedule == "lookahead":
        return parts + units
    steps = WINDOW + AHEAD
    states = 2 * round(steps**0.5)  # those kept, and those of the segment being swept
    return parts + units + KEPT * N / W * (steps + 3 * states + 3)


def held_plain(model: Model, W: int) -> float:
    """Weights, gradients and two moments in float32, two units' weights and gradients, the layers' inputs and one's inside."""
    inside = WEIGHT * TOKENS * (model.layers * model.d + 2 * model.outputs // model.layers)
    return 16 * model.elements / W + (WEIGHT + GRADIENT) * (model.root + 2 * model.unit) + inside


def seconds(exchanged: float, ops: float, W: int) -> float:
    """The longer of the two, which overlap."""
    rate = NEAR if W <= MACHINE else FAR
    return max(exchanged * (W - 1) / W / rate, ops / FLOPS)


def measure() -> list[dict[str, Any]]:
    rows = []
    for model in MODELS:
        N, root = model.elements, model.root
        for W in (8, 64, 256, 1024):
            step, ops = plain(N, root).bytes(), 8.0 * model.active * TOKENS
            base = {"model": model.name, "gpus": W, "elements": N}
            cells = {"bytes": step * (W - 1) / W, "operations": ops, "held": held_plain(model, W), "share": 1.0}
            rows.append(base | {"schedule": "plain"} | cells)
            for schedule in SCHEDULES:
                sent, more = moved(schedule, model), operations(schedule, model)
                share = seconds(step, ops, W) / (seconds(step, ops, W) + seconds(sent, more, W))
                cells = {"bytes": sent * (W - 1) / W, "operations": more, "held": held(schedule, model, W), "share": share}
                rows.append(base | {"schedule": schedule} | cells)
    return rows


def fits(rows: list[dict[str, Any]], row: dict[str, Any]) -> bool:
    """Whether the step with its attribution has room in a GPU's memory."""
    step = next(r for r in rows if (r["model"], r["gpus"], r["schedule"]) == (row["model"], row["gpus"], "plain"))
    return step["held"] + (0 if row is step else row["held"]) <= MEMORY


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| model | GPUs | schedule | GB moved | GB held | TFLOP | of plain | `every` for .9 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        is_plain = row["schedule"] == "plain"
        names = [row["model"], str(row["gpus"])] if is_plain else ["", ""]
        share = "" if is_plain else f"{row['share']:.2f}"
        every = "" if is_plain else f"{math.ceil(9 * (1 / row['share'] - 1) * (EVERY if 'window' in row['schedule'] else 1))}"
        share, every = (share, every) if fits(rows, row) else ("no room", "")
        sign = "" if is_plain else "+ "
        cells = [f"{sign}{row['bytes'] / 1e9:.1f}", f"{sign}{row['held'] / 1e9:.1f}", f"{sign}{row['operations'] / 1e12:.0f}"]
        lines.append("| " + " | ".join([*names, row["schedule"], *cells, share, every]) + " |")
    return "\n".join(lines)
