"""A window's sweep: from the validation gradient at its end back to its first step, by the adjoint of the optimizer's step.

What comes out for a step's gradient is a direction ``P`` like any other. The step's batch is run again where its weights were,
its calls are contracted with ``P``, and the feedback of its gradient is added to the weights' adjoint (docs/method.md, 6).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from adam_ghost.capture.recorder import Recorder
from adam_ghost.ledger.books import Audit
from adam_ghost.optim import OptState
from adam_ghost.optim.protocol import Adjoint
from adam_ghost.run.compiled import is_compiled
from adam_ghost.run.leave_out import Trajectory, compare
from adam_ghost.run.lookahead import ContractingRecording
from adam_ghost.run.rerun import CALLED_ONCE, KeptBatch, outputs_of, slopes
from adam_ghost.run.schedules import Entry, Scored
from adam_ghost.run.small_step import norm, whole_norms
from adam_ghost.run.store import Held
from adam_ghost.step.coverage import share_of
from adam_ghost.step.step import inner, reached_by, report_coverage, score_passes
from adam_ghost.step.whole_pass import WholePass

if TYPE_CHECKING:
    from adam_ghost.run.window import Window, WindowPlan

# relative difference up to which a batch that is run again has given the gradient that the loop used
_SAME_GRADIENT = 0.02
# of its movement, how far a tensor may be from where the optimizer's steps lead
_SAME_STATE = 0.01


@dataclass
class KeptStep:
    """One step of the optimizer as it was taken."""

    entry: Entry
    batches: list[KeptBatch]
    grads: Held  # that the optimizer used, None where there was none
    factor: Tensor  # [], what the loop's gradient was multiplied by to become these (clipped, unscaled)
    edited: Tensor  # [] bool: the gradients were changed in another way
    void: Tensor  # [] bool: the optimizer found the gradients not finite and did not step
    scalars: Any
    # the state before the step; None: to be had from an earlier step's
    tensors: Held | None = None
    rebuild: Callable[[list[Tensor | None]], OptState] | None = None

    @property
    def number(self) -> int:
        return self.entry.record.step

    def used(self) -> list[Tensor | None]:
        """The gradients that the optimizer stepped by, per parameter; none where it did not step."""
        grads = self.grads.get()
        return [None] * len(grads) if bool(self.void) else grads

    def state(self) -> OptState:
        """The state before the step, where it was kept."""
        assert self.tensors is not None and self.rebuild is not None
        return self.rebuild(self.tensors.get())

    def drop(self) -> None:
        self.grads.drop()
        if self.tensors is not None:
            self.tensors.drop()


class Sweep:
    """One walk back through kept steps."""

    def __init__(self, window: "Window", steps: list[KeptStep], plan: "WindowPlan"):
        self.window, self.loop, self.rerun, self.plan = window, window.loop, window.rerun, plan
        self.world = window.loop.world
        self.params, self.names = window.params, list(window.loop.params)
        self.all = steps
        self.steps = [s for s in steps if not bool(s.void)]
        self.recorder = Recorder(self.loop.model)
        self.compiled = is_compiled(self.loop.model)
        self.feedback = window.feedback

    def run(self) -> Iterator[tuple[Entry, Scored | None]]:
        """The scored steps, last first, None for those that the optimizer skipped.

        The weights, random numbers and modes are afterwards as before.
        """
        if not self.steps:
            return
        validation = self.loop.validation
        with validation.weights_kept(self.params) as (_, now), validation.undisturbed(advance=False), torch.no_grad():
            self.now = now
            self.feedback.begin()
            self.unclipped, self.max_norm, self.clipped = self._clipping()
            self.samples = self._samples()
            yield from self._walk()

    def _walk(self) -> Iterator[tuple[Entry, Scored | None]]:
        adjoint: Adjoint | None = None
        audited = self.steps[0] if self.plan.audit else None  # the step that looks ahead furthest
        segments = self._segments()
        for i, segment in reversed(list(enumerate(segments))):
            states = self._states(segment)
            if adjoint is not None:
                after = segments[i + 1][0].state()
                there = states[-1].advanced(segment[-1].used(), segment[-1].scalars)
                with self.world.together():
                    self._check_arrival(segment, *(x.kept(list(x.parameters()))[0] for x in (states[0], there, after)))
            else:
                end = states[-1].advanced(segment[-1].used(), segment[-1].scalars)
                if self.plan.end == self.loop.step:  # the weights are still those after its last step
                    with self.world.together():
                        self._check_arrival(segment, list(states[0].parameters()), list(end.parameters()), self.now)
                self.put(end)
                val_loss, val_grads = self.loop.validation.gradient(self.params)
                adjoint = end.adjoint([g if val_loss.ndim else g.unsqueeze(0) for g in val_grads])
                self.end = end
            for step in reversed(segment):
                state, used = states.pop(), step.used()
                if bool(step.void):
                    if step.number <= self.plan.last:
                        yield step.entry, None
                    continue
                raw, P = self._pull(step, state, used, adjoint)
                self.put(state)
                if step.number <= self.plan.last:
                    scored = self._score(step, used, raw, P, val_loss)
                    if step is audited:
                        step.entry.record.audit = self._audit(step, state, raw, scored)
                        self.put(state)
                    yield step.entry, scored
                if step is not self.steps[0]:
                    self._feed_back(step, raw, P, adjoint)

    def _segments(self) -> list[list[KeptStep]]:
        """Runs of steps, each beginning with a kept state."""
        segments: list[list[KeptStep]] = []
        for step in self.all:
            if step.tensors is not None:
                segments.append([])
            segments[-1].append(step)
        return segments

    @staticmethod
    def _states(segment: list[KeptStep]) -> list[OptState]:
        """The state before each step of a segment."""
        states = [segment[0].state()]
        for step, after in pairwise(segment):
            states.append(states[-1].advanced(step.used(), after.scalars))
        return states

    def _check_arrival(
        self,
        segment: list[KeptStep],
        start: Sequence[Tensor | None],
        there: Sequence[Tensor | None],
        found: Sequence[Tensor | None],
    ) -> None:
        """Raises ValueError where the optimizer's steps from ``start`` do not lead from there to what was ``found`` afterwards.

        Each are the weights, or as many tensors for every parameter.
        """
        each = len(found) // len(self.names)
        for i, (before, x, y) in enumerate(zip(start, there, found, strict=True)):
            some = y if x is None else x
            if some is None:
                continue
            x, y = (torch.zeros_like(some) if t is None else t for t in (x, y))
            moved = y if before is None else y - before
            allowed = _SAME_STATE * moved.norm() + 4 * torch.finfo(y.dtype).eps * y.norm()
            if not bool((x - y).norm() <= allowed):
                raise ValueError(
                    f"'{self.names[i // each]}' is not where steps {segment[0].number} to {segment[-1].number} lead: weights or"
                    " optimizer state were changed besides optimizer.step() (pruned, averaged, loaded, reset), through which"
                    " schedule='window' carries no credit; build a new run after such a change"
                )

    def put(self, state: OptState) -> None:
        """Gives the model the weights of ``state``."""
        self.world.settle()
        torch._foreach_copy_(self.world.parts(p.data for p in self.params), list(state.parameters()))

    # scaling

    def _clipping(self) -> tuple[Tensor, float | None, set[int]]:
        """The factor of gradients that were not clipped, the norm to which the others were (None where none were), and which.

        Told by what the steps that were scaled down have in common: the norm afterwards, or the factor.
        """
        norms = whole_norms(torch.stack([norm([g for g in s.used() if g is not None]) for s in self.steps]), self.world)
        factors = torch.stack([s.factor.to(norms) for s in self.steps])
        self.scaled = {s.number for s, factor in zip(self.steps, factors.tolist(), strict=True) if factor != 1}
        base, first = factors.max(), self.steps[0]
        down = factors < base * (1 - 1e-4)
        scaled = False
        if bool(base < 1 - 1e-4):  # all were made smaller: clipped, or unscaled after a backward pass on a loss scaled up
            self.put(self.all[0].state())
            self.rerun.find_scales(first.batches)
            here = {"scaled" for batch in first.batches if batch.scale is not None and bool(batch.scale > 1)}
            scaled = bool(self.world.union(here, ["scaled"]))
            # a scaler's factors are powers of two
            base = torch.exp2((base.log2() - 1e-3).ceil()) if scaled else torch.ones_like(base)
            powers = (factors / base).log2()
            down = (powers - powers.round()).abs() > 1e-3 if scaled else factors < base * (1 - 1e-4)
        clipped = norms[down]
        if len(clipped) == 0:
            return base, None, set()
        same_factor = len(clipped) > 1 and bool(factors[down].max() - factors[down].min() <= 1e-4 * factors[down].max())
        uneven = bool(clipped.max() - clipped.min() > 1e-3 * clipped.max())
        if uneven and not same_factor:
            self.window.coverage.tell(
                "clipping",
                f"steps {first.number} to {self.steps[-1].number}: gradients were scaled down by factors that change from step to"
                " step, and not to one norm; credit takes these factors for constants, which is wrong where they depend on the"
                " gradient: clip_grad_norm_ is followed with its norm_type=2, one max_norm, and all of the model's parameters",
            )
        if same_factor or uneven:
            return base, None, set()
        # one that was clipped by a power of two looks as a scaler's that was not; of gradients that were normalised, the one that
        # grew most as one that was left alone
        down = down | ((factors != 1) & ((norms - clipped.max()).abs() <= 1e-4 * clipped.max()))
        numbers = {s.number for s, is_clipped in zip(self.steps, down.tolist(), strict=True) if is_clipped}
        if len(numbers) == 1 and bool((norms > clipped.max() * (1 + 1e-3)).any()):
            self.window.coverage.tell(
                "clipping",
                f"step {min(numbers)}: its gradient was scaled down, alone among steps of which others kept a larger one; credit"
                " takes it for clip_grad_norm_'s doing, with its norm_type=2, which is wrong where the factor was a constant or"
                " another norm's",
            )
        return base, float(clipped.max()), numbers

    def _pull(
        self, step: KeptStep, state: OptState, used: list[Tensor | None], adjoint: Adjoint
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient of the loop's backward pass, before it was scaled, and ``P`` for it, ``[K, *shape]``, per parameter."""
        raw = [torch.zeros_like(p) if g is None else g for p, g in zip(state.parameters(), used, strict=True)]
        if step.number in self.scaled:
            raw = [g / step.factor.to(g.dtype) for g in raw]
        pulled = state.pull(used, adjoint, self._shares(step, used) if self.window.options.bounded else None)
        if step.number in self.clipped:
            # the factor, max_norm over the gradient's norm, shrinks as the gradient grows: nothing along it passes
            size = whole_norms(norm(raw), self.world)
            squared = size * (size + 1e-6 / self.unclipped)  # clip_grad_norm_'s own small number
            dots = [x.flatten(1) @ g.flatten().to(x.dtype) for x, g in zip(pulled, raw, strict=True)]  # each [K]
            along = self.world.sum_parts(torch.stack(dots).double().sum(0)) / squared
            pulled = [x - along.view(-1, *[1] * g.ndim).to(x.dtype) * g.to(x.dtype) for x, g in zip(pulled, raw, strict=True)]
        down = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in pulled]
        return raw, [x * -step.factor.to(x.dtype) for x in down]

    def _shares(self, step: KeptStep, used: list[Tensor | None]) -> list[Tensor]:
        """Per parameter, ``[]``: a sample's part of an element's gradient, if n samples' are as often up as down."""
        n = self.samples[step.number]
        norms = torch.stack([torch.zeros_like(step.factor) if g is None else g.norm().to(step.factor) for g in used])
        sizes = torch.tensor([p.numel() * n for p in self.params]).to(norms)
        return list((whole_norms(norms, self.world) / sizes.sqrt()).unbind())

    def _samples(self) -> dict[int, int]:
        """By step, how many samples all processes had in it."""
        here = [sum(len(batch.ids) for batch in step.batches) for step in self.steps]
        return {step.number: sum(each) for step, *each in zip(self.steps, *self.world.gather(here), strict=True)}

    # one step

    def _score(
        self, step: KeptStep, used: list[Tensor | None], raw: list[Tensor], directions: list[Tensor], val_loss: Tensor
    ) -> Scored:
        P = dict(zip(self.names, directions, strict=True))
        given = {name: g for name, g in zip(self.names, used, strict=True) if g is not None}
        # a few small parameters, whose gradients tell at little cost whether the batch runs as it did
        small = sorted(given, key=lambda name: self.loop.params[name].numel())[:3]
        again = {name: given[name].new_zeros(self.loop.params[name].shape) for name in small}
        carried = self.world.carry(P)
        recordings, scores, passes, scales = [], [], [], []
        for batch in step.batches:
            recording = ContractingRecording(carried, len(batch.ids), batch.packing)
            found, scale, pass_ = self._record(batch, recording, small)
            passes.append(pass_)
            scales.append(scale)
            for name, g in zip(small, found, strict=True):
                if g is not None:
                    again[name] += g * (step.factor * scale).to(g.dtype)
            recordings.append(recording)
            scores.append(recording.scores * (scale * self.world.share).to(recording.scores.dtype))
        self.world.carry(None)
        self.world.mean(list(again.values()))
        again = {name: self.world.part(name, g) for name, g in again.items()}
        self._compare(step, {name: given[name] for name in small}, again)
        coverage = self.window.coverage
        reached = reached_by(passes, recordings, self.loop.params, coverage) if self.loop.fallback else None
        whole, missing = report_coverage(given, recordings, coverage, reached=reached, world=self.world)
        if whole:
            lost = {name: P[name] for name in whole}
            more = score_passes(passes, recordings, self.loop.params, lost, world=self.world)
            coverage.tell_of_passes(whole, given, more is not None)
            if more is None:
                missing = whole
            else:
                parts = more.split([len(x) for x in scores])
                scales = [(scale * self.world.share).to(more.dtype) for scale in scales]
                scores = [x + part * scale for x, part, scale in zip(scores, parts, scales, strict=True)]
                step.entry.record.by_passes = share_of(whole, given)
                step.entry.record.passes = len(passes) * len(directions[0])
        total = self.world.sum_parts(inner(P, dict(zip(self.names, raw, strict=True))))
        record = step.entry.record
        record.coverage, record.window = self.window.coverage.share, self.plan.first
        record.horizon = self.steps[-1].number - step.number
        history = torch.full_like(total, float("nan"))  # no part of a window's credit is apart from its samples
        # where parameters are missing, no part of the total is known to be the others'
        return Scored(torch.cat(scores), val_loss, total, None if missing else total, history, step.edited)

    def _record(
        self, batch: KeptBatch, recording: ContractingRecording, small: list[str]
    ) -> tuple[Sequence[Tensor | None], Tensor, WholePass]:
        """Runs a batch again, contracts its calls as their gradients come; returns the gradients of the ``small`` parameters by
        this batch, the loss' scale and the pass itself.

        The weights' gradients, which are known, are not formed: two thirds of a backward pass are enough.
        """
        model, recorder = self.loop.model, self.recorder
        recording.outputs = []
        heads: list[Tensor] = []

        passes: list[WholePass] = []

        def begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
            passes.append(WholePass(module, args, kwargs))
            if not recorder.open:
                recorder.begin(recording)

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            passes[-1].ended(output)

        def take_head(module: nn.Module, args: tuple, output: Any) -> None:
            heads.append(outputs_of(output)[batch.output])

        recorder.attach()
        handles = [
            model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True),
            self.rerun.head.register_forward_hook(take_head),
            model.register_forward_hook(end, always_call=True),
        ]
        # compiled layers cannot be recorded
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        try:
            with torch.enable_grad(), eager:
                loss = self.rerun.loss(batch)
                recorder.end()  # the loss, too, was followed
                if not heads:
                    raise ValueError(CALLED_ONCE)
                held = {name: p for p, name in recorder.names.items()}  # as they were in the pass
                if gone := [name for name in small if name not in held]:
                    raise ValueError(
                        f"'{gone[0]}' is not the model's any more: through a change of its parameters within a window no credit is"
                        " carried; close the run before one, and build another"
                    )
                wanted = [*(get_gradient_edge(x) for x in (heads[-1], *(held[name] for name in small))), *recording.outputs]
                recording.outputs = None
                with self.world.passing():
                    out, *found = torch.autograd.grad(loss, wanted, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
            recorder.end()
            recorder.recording = None
            recorder.detach()
        return found[: len(small)], self.rerun.measure_scale(batch, slopes(out)), passes[-1]

    def _compare(self, step: KeptStep, used: dict[str, Tensor], again: dict[str, Tensor]) -> None:
        """Raises ValueError where the batch, run again, does not give the gradient that the optimizer used."""
        norms = torch.stack([norm([again[name] - g for name, g in used.items()]), norm(list(used.values()))])
        off, size = whole_norms(norms, self.world).unbind()
        if not bool(off <= _SAME_GRADIENT * size):
            changed = any(batch.changed() for batch in step.batches)
            why = "; its inputs were changed in place since: give run.batch copies" if changed else ""
            raise ValueError(
                f"step {step.number}: train_loss(inputs), run again at the step's weights, gives another gradient than the loop's"
                f" backward pass ({float(off / size):.0%} apart): it must return what the loop calls backward() on, up to a"
                f" factor, and draw random numbers from torch alone{why}"
            )

    def _feed_back(self, step: KeptStep, raw: list[Tensor], P: list[Tensor], adjoint: Adjoint) -> None:
        for k in range(len(P[0])):
            vector = [x[k].to(p.dtype) for x, p in zip(P, self.params, strict=True)]
            for x, h in zip(adjoint.weights, self.feedback(step.number, step.batches, raw, vector, k), strict=True):
                x[k] -= h

    def _audit(self, step: KeptStep, state: OptState, raw: list[Tensor], scored: Scored) -> Audit:
        """The step's credit against leaving a few of its samples out and training on to the window's end."""
        trajectory = Trajectory(self, state, step)
        chosen = trajectory.choose(self.window.options.audit_samples)
        self.put(self.end)
        with_all = self.loop.validation.loss().double()
        truth = [trajectory.without(i, raw) - with_all for i in chosen]
        return compare(scored.scores[chosen].double(), torch.stack(truth).reshape(len(chosen), -1))
