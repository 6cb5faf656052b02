"""Schedules: when the direction ``P`` is formed, and what a micro-batch leaves behind to be scored with it.

A schedule owns its hooks on the model, what it keeps from one step to the next, and its part of ``batch``, ``step`` and ``close``.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adam_ghost.capture.hooks import Hook
from adam_ghost.capture.learned import recorder_of
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.rows import Packing
from adam_ghost.ledger.books import StepRecord
from adam_ghost.optim import Optimizers, OptState, read_optimizer, settings
from adam_ghost.processes.world import World
from adam_ghost.run.compiled import CompiledLayers
from adam_ghost.run.lookahead import ContractingRecording, ScoredLinears
from adam_ghost.run.tokens import TokenScores, score_tokens
from adam_ghost.scores.forms import Directions
from adam_ghost.step.direction import Direction, ValidationGradient, form_direction, validation_gradient
from adam_ghost.step.fingerprint import Arrivals, GradientWatch
from adam_ghost.step.step import Step, inner
from adam_ghost.step.validation import Validation
from adam_ghost.step.whole_pass import WholePass

SCHEDULES = ("midpoint", "gauss", "lookahead", "window")
# optimizer steps after which the second moment foresees the size of gradients (measured: bench/predictions.py)
HISTORY = 10


@dataclass
class MicroBatch:
    """The samples of one forward and backward pass, and what was recorded of it."""

    ids: Sequence[Hashable]
    packing: Packing | None
    audit: bool  # whether its step will be played exactly, which needs the calls themselves
    inputs: Any = None  # what the loop computes its loss from, where it is to be run again
    recording: Recording | None = None
    kept: Any = None  # KeptBatch, in a window
    losses: Tensor | None = None  # [n], as the loop told them
    arrivals: Arrivals = field(init=False)  # of its gradients, from when it is opened
    whole: WholePass | None = None  # of an audited step
    views: int = 1  # rows of the model's batch that each sample has: all samples' first, then their second
    tokens: list[int] = field(default_factory=list)  # places of the samples whose tokens are scored, too

    @property
    def rows(self) -> int:
        return len(self.ids) * self.views

    def by_sample(self, scores: Tensor) -> Tensor:
        """``[n, K]`` of scores ``[views * n, K]``."""
        return scores if self.views == 1 else scores.view(self.views, len(self.ids), -1).sum(0)


@dataclass
class Loop:
    """What every schedule works with."""

    model: nn.Module
    optimizer: Optimizers
    params: dict[str, nn.Parameter]
    validation: Validation
    watch: GradientWatch
    rule: str
    every: int
    refresh: int
    half: bool
    world: World
    fallback: bool = True  # whether parameters that layer calls lose are scored by a pass of the whole model
    step: int = 0  # of the optimizer, counted from the construction
    attributed: int = 0  # steps

    @property
    def refreshes(self) -> bool:
        """Whether this step takes a new validation gradient."""
        return self.attributed % self.refresh == 0


class Scored(NamedTuple):
    """A step's scores, and the numbers that they are booked with."""

    scores: Tensor  # [n, K]
    val_loss: Tensor  # [] or [K]
    total: Tensor  # [K]: < P , g(B) >
    accounted: Tensor | None  # [K]: of that, what the scores have to add up to; None where nothing says
    history: Tensor  # [K]
    edited: Tensor  # bool: a gradient was changed in a way that the scores do not follow
    at: float | None = None  # where val_loss was taken in this step: 0 after history alone, 1 at its end; None: in another one
    unexplained: Callable[[], list[str]] | None = None  # the parameters whose calls do not explain their gradient
    tokens: Sequence[TokenScores | None] = ()  # of each micro-batch, where they were asked for


@dataclass
class Entry:
    """A step on its way to the books."""

    ids: list[Hashable]
    record: StepRecord
    losses: Tensor | None  # [n]


class Schedule(Protocol):
    """What the loop asks of a schedule."""

    per_step: bool  # whether a step is scored and booked when it is taken, by what it did alone

    @property
    def foreseen(self) -> Directions | None:
        """Of the step about to be taken, where they are known before its gradients are."""

    def attach(self) -> None:
        """Hangs its hooks on the model."""

    def detach(self) -> None:
        """Takes them off again and forgets what it holds."""

    def due(self) -> bool:
        """Whether the next step of the optimizer is to be followed."""

    def open(self, micro: MicroBatch, first: bool) -> None:
        """The next forward pass is ``micro``'s, ``first`` of its step."""

    def forget(self) -> None:
        """The gradients that have arrived are gone: they have no part in the step."""

    def drop(self) -> list[MicroBatch]:
        """Takes out the micro-batches of which no gradient has arrived, or which were forgotten."""

    def collect(self) -> list[MicroBatch] | None:
        """The step's micro-batches in their order, handed over; None where this step cannot be scored."""

    def pending(self) -> list[MicroBatch]:
        """Those collected so far."""

    def followed(self) -> AbstractContextManager[None]:
        """Around a loss outside of the model that uses its weights."""

    def withdraw(self) -> None:
        """The step that was scored last turned out to be another one."""

    def score(self, step: Step, micro: list[MicroBatch], edited: Tensor, entry: Entry, void: Tensor) -> Scored | None:
        """The scores of a step about to be taken; None where they come later, by ``swept`` or ``finish``."""

    def swept(self) -> "Iterable[tuple[Entry, Scored | None]]":
        """Called when the optimizer has stepped: earlier steps that can be scored now; None: it turns out to have skipped one."""

    def finish(self) -> "Iterable[tuple[Entry, Scored | None]]":
        """Called when the run ends: earlier steps that have not been scored."""

    def waiting(self) -> int | None:
        """The first step whose scores are still to come."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class Collecting:
    """Collects the micro-batches of the step in the making."""

    def __init__(self, loop: Loop):
        self.loop = loop
        self._micro: list[MicroBatch] = []

    @property
    def foreseen(self) -> Directions | None:
        return None

    def _watch(self) -> None:
        """Follows what becomes of the gradients, from now until the watch is told to remove its hooks."""
        self.loop.watch.on_cleared = lambda: self._forget(self.loop.watch.ended - 1)

    def _await(self, micro: MicroBatch) -> None:
        """Follows what becomes of the micro-batch's gradients."""
        if self._micro:
            self.loop.watch.await_beginnings()
        micro.arrivals = Arrivals(self.loop.watch)

    def followed(self) -> AbstractContextManager[None]:
        return nullcontext()

    def pending(self) -> list[MicroBatch]:
        return self._micro

    def forget(self) -> None:
        self._forget(self.loop.watch.ended)

    def _forget(self, last: int) -> None:
        """Those whose gradients came before more than ``last`` backward passes had ended."""
        for micro in self._micro:
            if micro.arrivals.last is not None and micro.arrivals.last <= last:
                micro.arrivals.last = None
                if micro.recording is not None:
                    micro.recording.forget()

    def drop(self) -> list[MicroBatch]:
        dropped = [m for m in self._micro if m.arrivals.last is None]
        self._micro = [m for m in self._micro if m.arrivals.last is not None]
        return dropped

    def collect(self) -> list[MicroBatch] | None:
        micro, self._micro = self._micro, []
        return micro


class After(Collecting):
    """``midpoint`` and ``gauss``: layer calls are kept until the gradients are final, and contracted with ``P`` then."""

    per_step = True

    def __init__(self, loop: Loop, place: str):
        super().__init__(loop)
        self.place = place
        self.recorder = recorder_of(loop.model, loop.world.size == 1, loop.validation.tree)
        self._val: ValidationGradient | None = None
        self._armed: MicroBatch | None = None
        self._handles: list[Any] = []
        self._following = False  # whether the loss is recorded, too
        self._lost: set[str] | None = None  # parameters that the last step's layer calls lost; None: no step has told

    def attach(self) -> None:
        model = self.loop.model
        self._watch()
        # ours see the forward pass first and last
        self._handles = [model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True)]
        self.recorder.attach()
        self._handles.append(model.register_forward_hook(Hook(self._after_forward), always_call=True))

    def detach(self) -> None:
        self.recorder.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.loop.watch.remove()
        self._armed, self._micro, self._val = None, [], None

    def due(self) -> bool:
        return self.loop.step % self.loop.every == 0

    def swept(self) -> list[tuple[Entry, Scored | None]]:
        return []

    finish = swept

    def withdraw(self) -> None:
        """Nothing is kept of it here."""

    def waiting(self) -> int | None:
        return None

    def open(self, micro: MicroBatch, first: bool) -> None:
        self._arm(micro, Recording(micro.packing))

    def _arm(self, micro: MicroBatch, recording: Recording) -> None:
        self.recorder.end()
        self._await(micro)
        micro.recording, recording.on_arrival = recording, micro.arrivals
        self._armed = micro

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        micro = self._armed
        if micro is None or micro.recording is None:
            return
        if torch.is_grad_enabled() and (self._following or not self.recorder.open):
            if micro.audit or (self.loop.fallback and self._lost != set()):
                micro.whole = WholePass(module, args, kwargs)
            self.loop.watch.forward_begins()
            if not self._following:
                self.recorder.begin(micro.recording)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Inside, all that is done with the armed micro-batch is recorded, not only the model's forward pass."""
        micro = self._armed
        if micro is None or micro.recording is None:
            yield
            return
        self._following = micro.recording.beyond = True
        self.recorder.begin(micro.recording)
        try:
            yield
        finally:
            self._following = False
            self.recorder.end()

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.recorder.open or self.recorder.inside_model:
            return
        if not self._following:
            self.recorder.end()
        micro, self._armed = self._armed, None
        if micro is None or micro.recording is None or output is None:  # the forward pass raised
            return
        rows = micro.recording.batch_size
        if micro.packing is None and rows != micro.rows:
            each = "" if micro.views == 1 else f" of {micro.views} rows each"
            raise ValueError(f"run.batch got {len(micro.ids)} ids{each}, but the model was called with a batch of {rows}")
        if micro.whole is not None:
            micro.whole.ended(output)
        self._micro.append(micro)

    def _abandon(self) -> None:
        """Awaits no forward pass any more: one that was announced and did not come, that broke off, or whose step was skipped."""
        self.recorder.end()
        self.recorder.recording, self._armed = None, None

    def collect(self) -> list[MicroBatch] | None:
        self._abandon()
        return super().collect()

    def score(self, step: Step, micro: list[MicroBatch], edited: Tensor, entry: Entry, void: Tensor) -> Scored | None:
        self._lost = {*step.whole, *step.missing}
        grads = {name: step.grads.get(name) for name in self.loop.params}
        direction = self._form(step.opt_state, step.params, grads, self.place)
        tokens: Sequence[TokenScores | None] = ()
        if any(m.tokens for m in micro):
            scores, tokens = score_tokens(step, direction.P, [m.tokens for m in micro], self.loop.half)
        else:
            scores = step.scores(direction.P, half=self.loop.half)
        at = 0.5 if self.loop.refreshes else None
        accounted = step.accounted(direction.P, direction.total)
        why = partial(step.unexplained, direction.P)
        return Scored(scores, direction.val_loss, direction.total, accounted, direction.history, edited, at, why, tokens)

    def _form(
        self,
        opt_state: OptState,
        params: dict,
        grads: dict[str, Tensor | None] | None,
        at: str,
        rounded: Collection[str] = (),
    ) -> Direction:
        """``P`` for ``params``, those ``rounded`` that are read so; ``grads`` are those of all trainable parameters, None for what
        history lets expect.
        """
        loop = self.loop
        val = self._val
        if val is None or loop.refreshes:
            val = validation_gradient(opt_state, loop.params, grads, loop.validation, at)
        keep = loop.refresh > 1
        self._val = val if keep else None
        return form_direction(opt_state, params, grads, val, loop.rule, loop.world, keep, rounded)

    def state_dict(self) -> Any:
        # parts of a gradient are of use to as many processes alone: a run on shards takes a new one when it goes on
        return None if self._val is None or self.loop.world.sharded else (self._val.loss, self._val.grads)

    def load_state_dict(self, state: Any) -> None:
        if state is None:
            self._val = None
            return
        loss, grads = state
        devices = {name: p.device for name, p in self.loop.params.items()}
        self._val = ValidationGradient(loss.to(next(iter(devices.values()))), {k: g.to(devices[k]) for k, g in grads.items()})


class Ahead(After):
    """``lookahead``: ``P`` is foreseen before the backward pass, and every layer is scored as its gradient is formed.

    The first ten steps of an optimizer, whose history foresees nothing yet, go the midpoint's way.
    """

    def __init__(self, loop: Loop):
        super().__init__(loop, "midpoint")
        self._direction: Direction | None = None
        self._P: Directions = {}  # of it, what layers are contracted with
        self._settings: list[dict[str, Any]] = []  # of the optimizers, which it was foreseen by
        self._reads: dict[str, torch.dtype] = {}  # what ``P`` of linear layers' weights was read in, in the last step that had them
        self._opened = 0  # the step that was announced last, counted from 1
        self._layers: ScoredLinears | CompiledLayers = ScoredLinears(loop.model, self.recorder)

    def attach(self) -> None:
        super().attach()
        self._layers.attach()
        world = self.loop.world
        if world.size > 1:  # before the model exchanges anything
            entrance = world.entrance(self.loop.model)
            self._handles.append(entrance.register_forward_pre_hook(Hook(self._runs), prepend=True))

    @property
    def foreseen(self) -> Directions | None:
        return None if self._direction is None else self._direction.P

    def detach(self) -> None:
        super().detach()  # a forward pass that is still under way has the layers' stand-ins behind its own
        self._layers.detach()
        self._direction = None
        self.loop.world.carry(None)

    def _runs(self, module: nn.Module, args: tuple) -> None:
        """The loop calls the model: where that was not announced, it was not in any process."""
        coming = self.loop.step + 1
        ours = self.loop.validation.running
        if torch.is_grad_enabled() and self._opened < coming and not ours and self.due():
            self.loop.world.meet("a forward pass before run.batch")

    def open(self, micro: MicroBatch, first: bool) -> None:
        if first:
            self._abandon()  # the validation pass is not to be recorded
            self.loop.world.meet("a step's first run.batch")
            self._opened = self.loop.step + 1
            self._direction = self._foresee()
            if self._direction is not None:
                # what is lost is scored by a pass of its own
                lost = (self._lost or ()) if self.loop.fallback else ()
                self._P = self.loop.world.carry({name: x for name, x in self._direction.P.items() if name not in lost})
        if self._direction is None:
            super().open(micro, first)
        else:
            self._arm(micro, ContractingRecording(self._P, micro.rows, micro.packing, keep=micro.audit))

    def _foresee(self) -> Direction | None:
        """``P`` from the gradient that history lets expect; None where it is too short."""
        loop = self.loop
        opt_state = read_optimizer(loop.optimizer)
        if not self._foreseeable(opt_state):
            return None
        self._settings = settings(loop.optimizer)
        rounded = () if loop.world.sharded else [name for name, dtype in self._reads.items() if dtype == torch.bfloat16]
        return self._form(opt_state, loop.params, None, "lookahead", rounded)

    def _foreseeable(self, opt_state: OptState) -> bool:
        # a step count on the device is not read; ours is never the larger
        return opt_state.steps_taken(default=self.loop.step) >= HISTORY

    def score(self, step: Step, micro: list[MicroBatch], edited: Tensor, entry: Entry, void: Tensor) -> Scored | None:
        direction, self._direction, self._P = self._direction, None, {}
        self.loop.world.carry(None)
        if direction is None:
            return super().score(step, micro, edited, entry, void)
        pairs = zip(self._settings, settings(self.loop.optimizer), strict=True)
        if changed := sorted({name for before, now in pairs for name in now if before.get(name) != now[name]}):
            raise ValueError(
                f"{', '.join(changed)} of the optimizer changed between run.batch and the step: schedule='lookahead' foresees the"
                " step in run.batch; change it before (a scheduler steps after the optimizer), or use schedule='midpoint'"
            )
        scale = step.factors()
        # the layers' scores are added up already: one factor has to serve all
        edited = edited | ((scale.max() - scale.min()).abs() > 1e-3 * scale.abs().max())
        if edited.device.type == "cpu" and bool(edited.any()):
            raise ValueError("gradients were scaled by different factors, which needs schedule='midpoint'")
        recordings = [m.recording for m in micro if isinstance(m.recording, ContractingRecording)]
        scores = torch.cat([r.scores for r in recordings])
        first, *later = recordings
        for recording in later:
            for name, dtype in recording.reads.items():
                first.read(name, dtype)
        self._reads |= first.reads
        for recording in recordings:
            recording.close()
        by_passes = step.whole_scores({name: direction.P[name] for name in step.whole})
        scores = scores if by_passes is None else scores + by_passes
        scores = scores * (scale.mean() * self.loop.world.share)
        self._lost = {*step.whole, *step.missing}
        at = 0.0 if self.loop.refreshes else None
        total = self.loop.world.sum_parts(inner(direction.P, step.grads) if step.reached is None else step.reached)
        accounted = step.accounted(direction.P, total)
        return Scored(scores, direction.val_loss, total, accounted, direction.history, edited, at)


class AheadCompiled(Ahead):
    """``lookahead`` in a model under torch.compile: no hooks; the first step, which has no history at all, is not attributed."""

    def __init__(self, loop: Loop):
        super().__init__(loop)
        self._layers = self._compiled = CompiledLayers(loop.model)
        self._running: ContractingRecording | None = None  # of the forward pass that was announced last

    def attach(self) -> None:
        self._watch()
        self._layers.attach()

    def open(self, micro: MicroBatch, first: bool) -> None:
        self._end()
        if first:
            self._direction = self._foresee()
        if self._direction is None:
            return
        recording = micro.recording = ContractingRecording(self._direction.P, len(micro.ids))
        self._await(micro)
        recording.on_arrival, recording.batch_size = micro.arrivals, len(micro.ids)
        self._compiled.begin(recording)
        self._running = recording
        self._micro.append(micro)

    def _end(self) -> None:
        if self._running is not None:
            self._compiled.end(self._running)
            self._running = None

    def _foreseeable(self, opt_state: OptState) -> bool:
        return opt_state.steps_taken(default=self.loop.step) > 0

    def collect(self) -> list[MicroBatch] | None:
        self._end()
        micro = super().collect()
        return micro or (None if not self._foreseeable(read_optimizer(self.loop.optimizer)) else [])
