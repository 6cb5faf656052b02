"""``schedule="window"``: what a sample did to the run, carried through the optimizer's dynamics over a window of steps.

The steps of a window, and of those ahead of it, are kept as they are taken, and then swept (``sweep.py``): back from the
validation gradient at the end, step by step. Mathematics: docs/method.md, 6.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.calls import rng_state
from adam_ghost.capture.hooks import Hook
from adam_ghost.ledger.books import StepRecord
from adam_ghost.run.rerun import KeptBatch, Rerun, outputs_of, slopes
from adam_ghost.run.schedules import Collecting, Entry, Loop, MicroBatch, Scored
from adam_ghost.run.store import Store
from adam_ghost.run.suited import SuitedFeedback
from adam_ghost.run.sweep import KeptStep, Sweep
from adam_ghost.step.coverage import Coverage
from adam_ghost.step.step import Step
from adam_ghost.warn import warn

# R of an audit below which a window is too long for its linearization, and above which a longer one may do
TOO_LONG, ROOM = 0.9, 0.99
_OUTLIER = 20  # times the usual size of a step's credit
_SHORTEST, _LONGEST = 4, 64  # steps of a window that chooses its own length


@dataclass
class WindowOptions:
    """How far credit looks, and by which means."""

    train_loss: Callable[[Any], Tensor]
    window: int = 32
    ahead: int = 32
    bounded: bool = True  # whether a step's derivative is bounded where it means nothing at a sample's distance
    auto: bool = False  # whether audits change both
    feedback: str = "auto"
    memory: int | None = None  # bytes
    audit_every: int | None = None  # windows
    audit_samples: int = 4


@dataclass(frozen=True)
class WindowPlan:
    """A window: steps ``first .. last`` (counted from 1) are scored, by the validation loss after step ``end``."""

    first: int
    last: int
    end: int
    audit: bool


class Window(Collecting):
    """Keeps steps, and sweeps each window when the steps ahead of it are done."""

    per_step = False

    def __init__(self, loop: Loop, options: WindowOptions, coverage: Coverage):
        super().__init__(loop)
        self.options, self.coverage = options, coverage
        self.params = list(loop.params.values())
        self.rerun = Rerun(loop.model, loop.params, options.train_loss, loop.world)
        self.feedback = SuitedFeedback(self.rerun, options.feedback, coverage)
        self.store = Store(options.memory)
        self._armed: MicroBatch | None = None
        self._kept: list[KeptStep] = []
        self._plans: deque[WindowPlan] = deque()
        self._planned = 0  # windows
        self._next = 1  # the first step of the next window
        self._handles: list[Any] = []
        self._sweeping = False
        self._warned_of_outliers = False

    # the training loop's side

    def attach(self) -> None:
        model = self.loop.model
        self._watch()
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before_forward)),
            self.rerun.head.register_forward_hook(Hook(self._output)),
            model.register_forward_hook(Hook(self._after_forward)),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.loop.watch.remove()
        self._armed, self._micro, self._kept = None, [], []
        self.store.close()

    def due(self) -> bool:
        coming = self.loop.step + 1
        while self._next <= coming:
            self._plan()
        return any(plan.first <= coming <= plan.end for plan in self._plans)

    def _plan(self) -> None:
        """The next window."""
        options, first = self.options, self._next
        last = first + options.window - 1
        self._planned += 1
        audit = options.audit_every is not None and self._planned % options.audit_every == 0
        self._plans.append(WindowPlan(first, last, last + options.ahead, audit))
        self._next = first + options.window * self.loop.every

    def open(self, micro: MicroBatch, first: bool) -> None:
        if micro.inputs is None:
            raise ValueError("schedule='window' runs batches again: call run.batch(ids, inputs=...) with what train_loss takes")
        if micro.packing is not None and self.options.audit_every is not None:
            raise ValueError(
                "audit_every, which leaves rows of a batch out and trains on, knows no samples that are packed in rows: build the"
                " run without it"
            )
        self._await(micro)
        self._armed, self._announced = micro, rng_state(self.rerun.device)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        micro = self._armed
        if micro is not None and micro.kept is None and torch.is_grad_enabled() and not self._sweeping:
            micro.kept = self.rerun.keep(micro.ids, micro.inputs, micro.packing, self._announced)
            self.loop.watch.forward_begins()

    def _output(self, module: nn.Module, args: tuple, output: Any) -> None:
        micro = self._armed
        if micro is None or micro.kept is None or self._sweeping:
            return
        kept: KeptBatch = micro.kept

        def arrived(i: int, grad: Tensor) -> None:
            micro.arrivals()
            kept.used[i] = slopes(grad)

        for i, x in enumerate(outputs_of(output)):
            if x.requires_grad:
                x.register_hook(partial(arrived, i))

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._armed is not None and self._armed.kept is not None and not self._sweeping:
            self._micro.append(self._armed)
            self._armed = None

    def collect(self) -> list[MicroBatch] | None:
        self._armed = None
        return super().collect()

    def score(self, step: Step, micro: list[MicroBatch], edited: Tensor, entry: Entry, void: Tensor) -> None:
        """Keeps the step; its scores come with its window's sweep."""
        if step.world.share != 1 / step.world.size:
            raise ValueError("schedule='window' takes gradients that are means over the processes: no set_gradient_divide_factor()")
        scale = step.factors()
        uneven = (scale.max() - scale.min()).abs() > 1e-3 * scale.abs().max()
        if edited.device.type == "cpu" and bool(uneven):
            raise ValueError("gradients were scaled by different factors, which needs schedule='midpoint'")
        names, number = list(self.loop.params), entry.record.step
        clones = [step.grads[name].detach().clone() if name in step.grads else None for name in names]
        kept = KeptStep(
            entry=entry,
            batches=[m.kept for m in micro],
            grads=self.store.put(clones),
            factor=scale.mean(),
            edited=edited.any() | uneven,
            void=void,
            scalars=step.opt_state.scalars(self.params),
        )
        if any(self._begins_segment(plan, number) for plan in self._plans):
            tensors, kept.rebuild = step.opt_state.kept(self.params)
            kept.tensors = self.store.put(tensors)
        self._kept.append(kept)

    def _begins_segment(self, plan: WindowPlan, number: int) -> bool:
        """Whether no state was kept yet since a multiple of a segment's steps in the window: those there may have been skipped."""
        start = number - (number - plan.first) % self._segment(plan)
        return not any(step.number >= start and step.tensors is not None for step in self._kept)

    @staticmethod
    def _segment(plan: WindowPlan) -> int:
        """Steps from one kept state of a window to the next: as many are held at once when it is swept as were kept."""
        return max(1, round((plan.end - plan.first + 1) ** 0.5))

    def withdraw(self) -> None:
        """The step that was kept last was another one: no window is carried through it, the next begins after it."""
        self._begin_anew()

    def _begin_anew(self) -> None:
        for step in self._kept:
            step.drop()
        self._kept = []
        self._plans.clear()
        self._next = self.loop.step + 1

    # the sweeps

    def swept(self) -> Iterator[tuple[Entry, Scored | None]]:
        """Called after each step of the optimizer: the steps that can be scored now."""
        while self._plans and self._plans[0].end <= self.loop.step:
            yield from self._sweep(self._plans.popleft())

    def finish(self) -> Iterator[tuple[Entry, Scored | None]]:
        """Scores what is left with the steps there are. Where a window cannot be, the others are, and its error comes last."""
        failed: Exception | None = None
        while self._plans:
            plan = self._plans.popleft()
            try:
                scored = self._sweep(plan)
            except (RuntimeError, ValueError) as error:
                if self.loop.world.size > 1:  # the others stop here as well
                    raise
                if failed is None:
                    failed = error
                else:
                    failed.args = (f"{failed}. Nor have steps {plan.first} to {min(plan.last, self.loop.step)}",)
                continue
            missing = plan.end - self.loop.step
            if scored and missing > 0:
                warn(f"the run ended {missing} steps before the window from step {plan.first} did: its scores look less far ahead")
            yield from scored
        if failed is not None:
            raise failed

    def _sweep(self, plan: WindowPlan) -> list[tuple[Entry, Scored | None]]:
        steps = [s for s in self._kept if plan.first <= s.number <= plan.end]
        found: list[tuple[Entry, Scored | None]] = []
        self._sweeping = True
        try:
            if steps and steps[0].number <= plan.last:
                found = list(Sweep(self, steps, plan).run())[::-1]
        except (RuntimeError, ValueError) as error:
            error.args = (  # of the same error, which the processes know that they have told each other
                f"adam_ghost: steps {plan.first} to {plan.last} have no scores: {error}. The training is as it would be without the"
                f" run, its step {self.loop.step} taken",
            )
            raise
        finally:
            self._sweeping = False
            needed = min((p.first for p in self._plans), default=self._next)
            for step in self._kept:
                if step.number < needed:
                    step.drop()
            self._kept = [s for s in self._kept if s.number >= needed]
        for entry, _ in found:
            self._heed(entry.record)
        self._tell_of_outliers(found)
        return found

    def _tell_of_outliers(self, found: list[tuple[Entry, Scored | None]]) -> None:
        """Says once where single steps outweigh all others, as the first can, in which the loss and the moments move most."""
        sized = [(entry.record.step, scored.scores.double().norm()) for entry, scored in found if scored is not None]
        if len(sized) < 3 or self._warned_of_outliers:
            return
        sizes = torch.stack([size for _, size in sized]).tolist()
        usual = sorted(sizes)[len(sizes) // 2]
        outliers = [step for (step, _), size in zip(sized, sizes, strict=True) if size > _OUTLIER * usual]
        if outliers:
            self._warned_of_outliers = True
            warn(
                f"the credit of steps {outliers[:6]} is more than {_OUTLIER} times that of the others, which it drowns in totals:"
                " rank by standardized scores, or build the run after the first steps"
            )

    def waiting(self) -> int | None:
        spans = [(plan.first, plan.last) for plan in self._plans]
        return min((s.number for s in self._kept if any(a <= s.number <= b for a, b in spans)), default=None)

    def _heed(self, record: StepRecord) -> None:
        """Takes an audit's word on the length of the windows."""
        audit, options = record.audit, self.options
        if audit is None or math.isnan(audit.r) or (audit.r >= TOO_LONG and not options.auto):
            return
        now = f"{options.window} steps and {options.ahead} ahead"
        if not options.auto:
            warn(
                f"windows of {now} are too long here: at step {record.step} the credit has R = {audit.r:.2f} with leaving samples"
                " out and training on; use shorter ones, or window='auto'"
            )
        elif audit.r < TOO_LONG and options.window > _SHORTEST:
            self.options = replace(options, window=options.window // 2, ahead=options.ahead // 2)
        elif audit.r > ROOM and options.window < _LONGEST:
            self.options = replace(options, window=options.window * 2, ahead=options.ahead * 2)

    def state_dict(self) -> Any:
        """What a window kept is not saved: a resumed run begins a window anew, and says which steps are left out."""
        return {"window": self.options.window, "ahead": self.options.ahead, "waiting": self.waiting()}

    def load_state_dict(self, state: Any) -> None:
        self._begin_anew()
        if self.options.auto:
            self.options = replace(self.options, window=state["window"], ahead=state["ahead"])
        if state["waiting"] is not None:
            warn(
                f"the run resumes in the middle of a window: steps {state['waiting']} to {self.loop.step}, whose steps ahead were"
                " not done, are left out; the next window begins here"
            )
