"""``schedule="window"``: what a sample did to the run, carried through the optimizer's dynamics over a window of steps.

The steps of a window are kept as they are taken. When those ahead of it are done too, it is swept: back from the validation
gradient at its end, step by step, by the adjoint of the optimizer's step. What comes out for a step's gradient is a direction
``P`` like any other; the step's batch is run again where its weights were, and its calls are contracted with ``P``.
Mathematics: docs/method.md, 6.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.hooks import Hook
from adam_ghost.capture.recorder import Recorder
from adam_ghost.optim import OptState
from adam_ghost.optim.protocol import Adjoint
from adam_ghost.run.feedback import FEEDBACKS, norm
from adam_ghost.run.lookahead import ContractingRecording
from adam_ghost.run.rerun import KeptBatch, Rerun, first_output
from adam_ghost.run.schedules import Collecting, Entry, Loop, MicroBatch, Scored
from adam_ghost.step.coverage import Coverage
from adam_ghost.step.step import Step, report_coverage
from adam_ghost.warn import warn

# relative difference up to which a batch that is run again has given the gradient that the loop used
_SAME_GRADIENT = 0.02


@dataclass
class KeptStep:
    """One step of the optimizer as it was taken."""

    entry: Entry
    batches: list[KeptBatch]
    grads: list[Tensor | None]  # that the optimizer used
    factor: Tensor  # [], what the loss' gradient was multiplied by to become these (clipped, averaged)
    void: Tensor  # [] bool: the optimizer found the gradients not finite and did not step
    scalars: Any
    state: OptState | None  # before the step; None: to be had from an earlier step's

    @property
    def number(self) -> int:
        return self.entry.record.step


@dataclass
class WindowOptions:
    """How far credit looks, and by which means."""

    train_loss: Callable[[Any], Tensor]
    window: int = 32
    ahead: int = 32
    feedback: str | None = None


class Window(Collecting):
    """Keeps steps, and sweeps each window when the steps ahead of it are done."""

    def __init__(self, loop: Loop, options: WindowOptions, coverage: Coverage):
        super().__init__(loop)
        self.options, self.coverage = options, coverage
        self.params = list(loop.params.values())
        self.rerun = Rerun(loop.model, loop.params, options.train_loss)
        self._segment = max(1, round((options.window + options.ahead) ** 0.5))  # steps from one kept state to the next
        self._armed: MicroBatch | None = None
        self._kept: list[KeptStep] = []
        self._handles: list[Any] = []
        self._sweeping = False

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

    def due(self) -> bool:
        return self.loop.step % self._cycle < self.options.window + self.options.ahead

    @property
    def _cycle(self) -> int:
        """Steps from one swept window's first to the next one's."""
        return self.options.window * self.loop.every

    def open(self, micro: MicroBatch, first: bool) -> None:
        if micro.inputs is None:
            raise ValueError("schedule='window' runs batches again: call run.batch(ids, inputs=...) with what train_loss takes")
        self._await(micro)
        self._armed = micro

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        if self._armed is not None and self._armed.kept is None and torch.is_grad_enabled() and not self._sweeping:
            micro = self._armed
            micro.kept = self.rerun.keep(micro.ids, micro.inputs, micro.packing)
            self.rerun.note_forward(micro.kept)
            self.loop.watch.forward_begins()

    def _output(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._armed is None or self._armed.kept is None or self._sweeping:
            return
        micro, out = self._armed, first_output(output)
        if out is None or not out.requires_grad:
            return

        def arrived(grad: Tensor) -> None:
            micro.arrivals()
            micro.kept.first_row = grad.detach()[0].norm() if grad.ndim else grad.detach().abs()

        out.register_hook(arrived)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._armed is not None and self._armed.kept is not None and not self._sweeping:
            self._micro.append(self._armed)
            self._armed = None

    def collect(self) -> list[MicroBatch] | None:
        self._armed = None
        return super().collect()

    def score(self, step: Step, micro: list[MicroBatch], edited: Tensor, entry: Entry, void: Tensor) -> None:
        """Keeps the step; its scores come with its window's sweep."""
        scale = torch.stack(list(step.scale.values()))
        uneven = (scale.max() - scale.min()).abs() > 1e-3 * scale.abs().max()
        if edited.device.type == "cpu" and bool(uneven):
            raise ValueError("gradients were scaled by different factors, which needs schedule='midpoint'")
        grads = [None if name not in step.grads else step.grads[name].detach().clone() for name in self.loop.params]
        starts = (self.loop.step - 1) % self._cycle % self._segment == 0 or not self._kept
        state = step.opt_state.kept(self.params) if starts else None
        scalars = step.opt_state.scalars(self.params)
        self._kept.append(KeptStep(entry, [m.kept for m in micro], grads, scale.mean(), void, scalars, state))

    def swept(self) -> list[tuple[Entry, Scored]]:
        """Called after each step of the optimizer: the steps that can be scored now."""
        done = self.loop.step - self.options.window - self.options.ahead
        if done < 0 or done % self._cycle or not self._kept:
            return []
        return self._sweep(done, done + self.options.window)

    def finish(self) -> list[tuple[Entry, Scored]]:
        """Scores what is left with the steps there are."""
        found = []
        while self._kept:
            first = (self._kept[0].number - 1) // self._cycle * self._cycle
            last = self._kept[-1].number
            if self._kept[0].number > first + self.options.window:  # steps ahead of a window that was swept
                self._kept.clear()
                break
            missing = first + self.options.window + self.options.ahead - last
            found += self._sweep(first, first + self.options.window)
            if missing > 0 and found:
                warn(f"the run ended {missing} steps before the last window's end: its scores look less far ahead")
        return found

    def _sweep(self, after: int, score_to: int) -> list[tuple[Entry, Scored]]:
        """Scores the kept steps with numbers in ``(after, score_to]``, and forgets them."""
        steps = [s for s in self._kept if s.number > after]
        found: list[tuple[Entry, Scored]] = []
        self._sweeping = True
        try:
            if steps:
                found = list(Sweep(self, steps, score_to).run())[::-1]
        finally:
            self._sweeping = False
        keep_from = after + self._cycle
        self._kept = [s for s in self._kept if s.number > keep_from]
        return found

    def state_dict(self) -> Any:
        return None

    def load_state_dict(self, state: Any) -> None:
        self._kept = []


class Sweep:
    """One walk back through kept steps."""

    def __init__(self, window: Window, steps: list[KeptStep], score_to: int):
        self.window, self.loop, self.rerun = window, window.loop, window.rerun
        self.params = window.params
        self.steps = [s for s in steps if not bool(s.void)]
        self.score_to = score_to
        feedback = window.options.feedback
        self.feedback = FEEDBACKS[feedback or "differences"]
        self.recorder = Recorder(self.loop.model)

    def run(self) -> Iterator[tuple[Entry, Scored]]:
        validation = self.loop.validation
        self.max_norm = self._clipped_to()
        with validation.weights_kept(self.params), validation.undisturbed():
            self.recorder.attach()
            try:
                yield from self._walk()
            finally:
                self.recorder.detach()

    def _walk(self) -> Iterator[tuple[Entry, Scored]]:
        adjoint: Adjoint | None = None
        for segment in reversed(self._segments()):
            states = self._states(segment)
            if adjoint is None:
                end = states[-1].advanced(segment[-1].grads, segment[-1].scalars)
                self._put(end)
                val_loss, val_grads = self.loop.validation.gradient(self.params)
                adjoint = end.adjoint([g if val_loss.ndim else g.unsqueeze(0) for g in val_grads])
            for step in reversed(segment):
                state = states.pop()
                wanted = step.number <= self.score_to
                raw, pulled = self._pull(step, state, adjoint)
                self._put(state)
                if wanted:
                    yield step.entry, self._score(step, raw, pulled, val_loss)
                if step is not self.steps[0]:
                    self._feed_back(step, raw, pulled, adjoint)

    def _segments(self) -> list[list[KeptStep]]:
        """Runs of steps, each beginning with a kept state."""
        segments: list[list[KeptStep]] = []
        for step in self.steps:
            if step.state is not None:
                segments.append([])
            segments[-1].append(step)
        return segments

    def _states(self, segment: list[KeptStep]) -> list[OptState]:
        """The state before each step of a segment."""
        states = [segment[0].state]
        for step, after in pairwise(segment):
            states.append(states[-1].advanced(step.grads, after.scalars))
        return states

    def _put(self, state: OptState) -> None:
        torch._foreach_copy_([p.data for p in self.params], list(state.parameters()))

    def _clipped_to(self) -> float | None:
        """The norm that gradients were clipped to; None where they were not, or multiplied by one constant.

        Told by what is the same in all steps that were scaled down: the norm afterwards, or the factor.
        """
        norms = [norm([g for g in s.grads if g is not None]) for s in self.steps]
        table = torch.stack([torch.stack(norms), torch.stack([s.factor.to(norms[0]) for s in self.steps])]).tolist()
        clipped = [(norm, factor) for norm, factor in zip(*table, strict=True) if factor < 1 - 1e-4]
        if not clipped:
            return None
        norms, factors = zip(*clipped, strict=True)
        same_factor = len(clipped) > 1 and max(factors) - min(factors) <= 1e-4 * max(factors)
        return None if same_factor or max(norms) - min(norms) > 1e-3 * max(norms) else max(norms)

    def _pull(self, step: KeptStep, state: OptState, adjoint: Adjoint) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of the loss before it was scaled, and its adjoint, ``[K, *shape]``, per parameter."""
        raw = [
            torch.zeros_like(p) if g is None else g / step.factor.to(g.dtype) for p, g in zip(self.params, step.grads, strict=True)
        ]
        pulled = state.pull(step.grads, adjoint)
        factor = step.factor
        clipped = self.max_norm is not None and bool(factor < 1 - 1e-4)
        if clipped:
            size = norm(raw)
            along = sum((x.flatten(1) @ g.flatten().to(x.dtype) for x, g in zip(pulled, raw, strict=True)))  # [K]
            share = (along / (size * (size + 1e-6))).to(along.dtype)
            pulled = [
                factor.to(x.dtype) * (x - share.view(-1, *[1] * g.ndim) * g.to(x.dtype)) for x, g in zip(pulled, raw, strict=True)
            ]
        else:
            pulled = [x * factor.to(x.dtype) for x in pulled]
        return raw, pulled

    def _score(self, step: KeptStep, raw: list[Tensor], pulled: list[Tensor], val_loss: Tensor) -> Scored:
        names = list(self.loop.params)
        P = {name: -x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in zip(names, pulled, strict=True)}
        small = self._smallest(step)
        found = {name: torch.zeros_like(self.loop.params[name]) for name in small}
        recordings = []
        for batch in step.batches:
            recording = ContractingRecording(P, len(batch.ids), batch.packing)
            recording.outputs = []
            loss = self._recorded_loss(batch, recording)
            wanted = [*recording.outputs, *(self.loop.params[name] for name in small)]
            # without the weights' gradients, which are known: two thirds of a backward pass
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            for name, g in zip(small, grads[len(recording.outputs) :], strict=True):
                if g is not None:
                    found[name] += g
            recording.outputs = None
            recordings.append(recording)
        self.recorder.recording = None
        self._compare(step, found)
        given = {name: g for name, g in zip(names, step.grads, strict=True) if g is not None}
        report_coverage(given, recordings, self.window.coverage)
        scores = torch.cat([r.scores for r in recordings])
        total = torch.stack([P[name].flatten(1) @ g.flatten().to(P[name].dtype) for name, g in zip(names, raw, strict=True)]).sum(0)
        step.entry.record.coverage = self.window.coverage.share
        step.entry.record.horizon = self.steps[-1].number - step.number
        step.entry.record.window = self.steps[0].number
        nothing = torch.full_like(total, float("nan"))
        return Scored(scores, val_loss, total, nothing, torch.zeros((), dtype=torch.bool, device=total.device))

    def _recorded_loss(self, batch: KeptBatch, recording: ContractingRecording) -> Tensor:
        model, recorder = self.loop.model, self.recorder

        def begin(module: nn.Module, args: tuple) -> None:
            if not recorder.open:
                recorder.begin(recording)

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            if recorder.open and not recorder.inside_model:
                recorder.end()

        handles = [model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end, always_call=True)]
        try:
            return self.rerun.loss(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _smallest(self, step: KeptStep) -> list[str]:
        """A few small parameters, whose gradients tell at little cost whether a batch runs as it did."""
        sized = [(g.numel(), name) for name, g in zip(self.loop.params, step.grads, strict=True) if g is not None]
        return [name for _, name in sorted(sized)[:3]]

    def _compare(self, step: KeptStep, found: dict[str, Tensor]) -> None:
        """Raises ValueError where the batch, run again, does not give the gradient that the optimizer used."""
        used = dict(zip(self.loop.params, step.grads, strict=True))
        again = {name: g * step.factor.to(g.dtype) for name, g in found.items()}
        off = norm([again[name] - used[name] for name in found])
        size = norm([used[name] for name in found])
        if not bool(off <= _SAME_GRADIENT * size):
            raise ValueError(
                f"step {step.number}: train_loss(inputs), run again at the step's weights, gives another gradient than the loop's"
                f" backward pass ({float(off / size):.0%} apart): it must return exactly what the loop calls backward() on"
            )

    def _feed_back(self, step: KeptStep, raw: list[Tensor], pulled: list[Tensor], adjoint: Adjoint) -> None:
        for k in range(len(pulled[0])):
            product = self.feedback(
                self.rerun, step.batches, raw, [x[k].to(p.dtype) for x, p in zip(pulled, self.params, strict=True)]
            )
            for x, h in zip(adjoint.weights, product, strict=True):
                x[k] += h
