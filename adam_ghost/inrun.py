"""Attribution inside a training loop that somebody already has: two added lines, and training stays what it was."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from adam_ghost.capture import Recorder, Recording
from adam_ghost.compiled import CompiledLayers, is_compiled
from adam_ghost.cpu import multiplies_bfloat16
from adam_ghost.direction import Direction, ValidationGradient, form_direction, validation_gradient
from adam_ghost.fingerprint import Fingerprint
from adam_ghost.layer_cache import SELF_CHECK, Coverage, refuse_mixed_samples
from adam_ghost.lookahead import ContractingRecording, ScoredLinears
from adam_ghost.reference import RULES
from adam_ghost.shapley import play
from adam_ghost.state import AdamState
from adam_ghost.step import Step, gather_step
from adam_ghost.totals import Readback, SampleScores, Totals
from adam_ghost.validation import Validation

if TYPE_CHECKING:
    from adam_ghost.ledger.writer import LedgerWriter

SCHEDULES = ("midpoint", "gauss", "lookahead")
# optimizer steps after which the second moment foresees the size of gradients (measured: bench/predictions.py)
_HISTORY = 10


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


@dataclass
class _MicroBatch:
    ids: list[Hashable]
    offsets: Tensor | None
    recording: Recording
    losses: Tensor | None = None  # [n], as the loop told them


@dataclass
class _Pending:
    """A step's results on their way from the device."""

    ids: list[Hashable]
    record: StepRecord
    scores: Readback  # [n, K]
    books: Readback  # [4, K]: val_loss, total, history, 1 where the step is void
    edited: Readback  # bool, per gradient
    losses: Readback | None = None  # [n]
    epoch: int | None = None


class InRun:
    """Attributes every step of a training loop, in the optimizer's own pre-step hook, where gradients are final.

        run = adam_ghost.InRun(model, optimizer, val_loss)
        for ids, x, y in loader:
            run.batch(ids)  # names the samples of the next forward pass
            criterion(model(x), y).backward()
            optimizer.step(); optimizer.zero_grad()

    Scores are those of the gradient that the optimizer uses: accumulated over micro-batches (call ``batch`` before each),
    unscaled and clipped. Training does not change: parameters, optimizer state and random numbers are those of the same
    loop without it, to the bit (``lookahead``: to rounding, where linear layers' gradients come from another product).
    Forward passes that ``batch`` did not announce are left alone: evaluation, generation. Models under ``torch.compile``
    take ``lookahead`` (without graph breaks); there, calls without a batch dimension and layers of kinds that PyTorch does
    not know are named and left out.

    Args:
        model: called with the batch along dimension 0.
        optimizer: the one ``torch.optim.Adam`` or ``AdamW`` that trains all of the model's trainable parameters.
        val_loss: returns the loss to attribute, ``[]`` or ``[K]``, with a graph; may draw a new batch each time.
        schedule: ``midpoint`` (faithful: the validation gradient at the midpoint of each step, layer calls kept until
            then), ``gauss`` (most faithful: at two points of each step, for a second validation pass) or ``lookahead``
            (fastest: ``P`` predicted before the backward pass from Adam's history, nothing kept; the first ten steps, which
            have no such history, go the midpoint's way).
        rule: how Adam's nonlinearity is linearized, as in ``attribute``.
        every: attribute every that many optimizer steps; the others are plain training.
        refresh: take a new validation gradient every that many attributed steps.
        audit_every: compare every that many attributed steps with the exact game (``exact_shapley``; costs
            ``2 * audit_permutations * n`` validation losses); the validation batch should be fixed then.
        half: in ``midpoint``, round the operands of the scores' large float32 products to bfloat16 (sums stay in float32),
            which moved the scores of real texts by less than a thousandth. None: where it is faster, on CPUs that multiply
            bfloat16.
        strict: raise where a parameter's gradient cannot be attributed, instead of warning once.
        ledger: a folder to write every score and every step's books to (``adam_ghost.open_ledger`` reads it), or a
            ``LedgerWriter`` with more choices. ``run.epoch`` is written beside each step, if set.

    Raises:
        TypeError, ValueError: on construction, naming the argument, before anything is changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        val_loss: Callable[[], Tensor],
        schedule: str = "midpoint",
        *,
        rule: str = "secant",
        every: int = 1,
        refresh: int = 1,
        audit_every: int | None = None,
        audit_permutations: int = 8,
        half: bool | None = None,
        strict: bool = False,
        ledger: "str | os.PathLike | LedgerWriter | None" = None,
    ):
        _check_arguments(model, optimizer, val_loss, schedule, rule, audit_every)
        for name, value in (("every", every), ("refresh", refresh), ("audit_every", audit_every or 1)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.model, self.optimizer = model, optimizer
        self.schedule, self.rule, self.every, self.refresh = schedule, rule, every, refresh
        self._place = "gauss" if schedule == "gauss" else "midpoint"  # of the validation gradient, after a backward pass
        self.audit_every, self.audit_permutations = audit_every, audit_permutations
        self.half = multiplies_bfloat16() if half is None else half
        self.validation = Validation(val_loss, model)
        self.coverage = Coverage(strict)
        self.steps: list[StepRecord] = []  # of the attributed steps, as far as their numbers have arrived
        self.step = 0  # of the optimizer, counted from the construction
        self.epoch: int | None = None  # for the ledger
        self._attributed = 0
        self._totals = Totals()
        self._squeeze = True
        self._val: ValidationGradient | None = None
        self._direction: Direction | None = None
        self._micro: list[_MicroBatch] = []
        self._armed: _MicroBatch | None = None
        self._outgoing: deque[Tensor] = deque()
        self._pending: list[_Pending] = []
        self._fingerprint: Fingerprint | None = None
        self._backwards: set[int] = set()
        self._warned = False
        self._seconds = 0.0
        self._closed = False
        self._params = [p for p in model.parameters() if p.requires_grad]
        self.ledger = _open_writer(ledger)

        self._recorder = Recorder(model)
        self._compiled = CompiledLayers(model) if is_compiled(model) else None
        self._layers = self._compiled or ScoredLinears(model, self._recorder)
        self._handles = [optimizer.register_step_pre_hook(self._before_step)]
        if self._compiled is None:
            # ours see the forward pass first and last
            self._handles.append(model.register_forward_pre_hook(self._before_forward))
            self._recorder.attach()
            self._handles.append(model.register_forward_hook(self._after_forward, always_call=True))
        if schedule == "lookahead":
            self._layers.attach()

    def __enter__(self) -> "InRun":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes everything off the model and the optimizer; what was scored stays readable."""
        if self._closed:
            return
        self._closed = True
        if self._recorder.open:
            self._recorder.end()
        self._recorder.detach()
        if self.schedule == "lookahead":
            self._layers.detach()
        for handle in self._handles:
            handle.remove()
        self._micro, self._armed, self._direction, self._val, self._fingerprint = [], None, None, None, None
        self._outgoing.clear()
        try:
            self._drain(wait=True)
        finally:
            if self.ledger is not None:
                self.ledger.close()

    # the user's loop

    def batch(self, ids: Sequence[Hashable] | Tensor, offsets: Tensor | None = None) -> None:
        """Names the samples of the next forward pass; before each micro-batch, if gradients are accumulated.

        Args:
            ids: one integer or string per sample, in the order of the batch.
            offsets: for samples packed in rows, ``[len(ids) + 1]`` integers: sample ``i`` is the tokens
                ``offsets[i]:offsets[i + 1]`` of all rows in a line (``cu_seqlens``).

        Raises:
            ValueError: wrong lengths, a BatchNorm in training mode, or gradients changed since the last micro-batch.
        """
        if self._closed:
            raise RuntimeError("this run is closed")
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if offsets is not None and (offsets.ndim != 1 or len(offsets) != len(ids) + 1 or offsets.is_floating_point()):
            raise ValueError(f"offsets must be [{len(ids) + 1}] integers for {len(ids)} ids, got {list(offsets.shape)}")
        if self.step % self.every:
            return
        started = time.perf_counter()
        if self.ledger is not None:
            self.ledger.begin(ids, self._settings)
        refuse_mixed_samples(self.model)
        self._settle()
        audit = self._audit_due()
        if offsets is not None and (audit or self._compiled):
            what = "audit_every" if audit else "a compiled model"
            raise ValueError(f"{what} cannot be used with samples packed in rows")
        if self.schedule == "lookahead":
            if not self._micro:
                state = AdamState.of(self.optimizer)
                self._direction = self._look_ahead(state) if self._foreseeable(state) else None
            if self._direction is None and self._compiled:
                return
        if self._direction is not None:
            recording: Recording = ContractingRecording(self._direction.P, len(ids), offsets, keep=audit)
        else:
            recording = Recording(offsets)
        recording.on_arrival, recording.outgoing = self._gradient_arrived, self._outgoing
        micro = _MicroBatch(ids, offsets, recording)
        if self._compiled:
            self._end_compiled()
            recording.batch_size = len(ids)
            self._compiled.begin(recording)
            self._micro.append(micro)
        else:
            self._armed = micro
        self._seconds += time.perf_counter() - started

    def losses(self, losses: Tensor) -> None:
        """Tells the ledger each sample's share of the training loss, ``[n]``; after the forward pass that ``batch`` announced."""
        if self._micro:
            if losses.shape != (len(self._micro[-1].ids),):
                raise ValueError(f"losses must be [{len(self._micro[-1].ids)}], one per id, got {list(losses.shape)}")
            self._micro[-1].losses = losses.detach()

    def _foreseeable(self, state: AdamState) -> bool:
        """Whether Adam's history is long enough to predict ``P`` from; before, lookahead goes the midpoint's way."""
        states = [s for s in state if s.exp_avg is not None]
        if not states:
            return False
        # a step count on the device is not read; ours is never the larger
        done = [self.step if torch.is_tensor(s.scalars.t) else s.scalars.t - 1 for s in states]
        return max(done) >= _HISTORY or self._compiled is not None

    def _end_compiled(self) -> None:
        if self._compiled and self._micro:
            self._compiled.end(self._micro[-1].recording)

    def _audit_due(self) -> bool:
        return self.audit_every is not None and self._attributed % self.audit_every == self.audit_every - 1

    def _settle(self) -> None:
        """Forgets micro-batches whose gradients were cleared without a step (a scaler that skipped it, a restarted loop)."""
        if not self._micro:
            return
        grads = [p.grad for p in self._params if p.grad is not None]
        if self._fingerprint is not None and self._fingerprint.untouched(grads):
            return
        if any(bool(g.any()) for g in grads):
            self._micro = []
            raise ValueError("gradients were changed between two micro-batches of a step: scale or clip them once, before the step")
        self._book(self._record(sum(len(m.ids) for m in self._micro), skipped=True), self.epoch)
        self._micro, self._fingerprint = [], None

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        if self._armed is not None and torch.is_grad_enabled() and not self._recorder.open:
            self._backwards.clear()
            self._recorder.begin(self._armed.recording)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._recorder.open or self._recorder.inside_model:
            return
        self._recorder.end()
        micro, self._armed = self._armed, None
        if output is None:  # the forward pass raised
            return
        n = micro.recording.batch_size
        if micro.offsets is None and n != len(micro.ids):
            raise ValueError(f"run.batch got {len(micro.ids)} ids, but the model was called with a batch of {n}")
        self._micro.append(micro)

    def _gradient_arrived(self) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._backwards:
            self._backwards.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        grads = [p.grad for p in self._params if p.grad is not None]
        if grads:
            self._fingerprint = Fingerprint.of(grads)

    # the step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise ValueError("optimizer.step(closure) computes gradients inside the step: call backward() before step()")
        self._recorder.recording, self._armed = None, None
        self._end_compiled()
        micro, self._micro = self._micro, []
        due, self.step = self.step % self.every == 0, self.step + 1
        if not due:
            return
        started = time.perf_counter() - self._seconds
        try:
            self._attribute(micro, started)
        finally:
            self._direction, self._fingerprint, self._seconds = None, None, 0.0
            # a CPU maps fresh memory page by page, at a tenth of the step's cost: the next step's gradients shall find this memory
            kept = (grad for m in micro for call in m.recording.calls for grad in call.grad_output.values())
            self._outgoing = deque(grad for grad in kept if grad.device.type == "cpu")
        self._drain()

    def _attribute(self, micro: list[_MicroBatch], started: float) -> None:
        state = AdamState.of(self.optimizer)
        if not micro and self._compiled and not self._foreseeable(state):
            return
        if not micro:
            raise RuntimeError("optimizer.step() without a recorded forward pass: call run.batch(ids) before the model's forward")
        if self._fingerprint is None:
            raise RuntimeError("optimizer.step() without a backward pass through the recorded forward pass")
        step = gather_step(self.model, state, [m.recording for m in micro], self.coverage)
        void, edited = self._follow_scaling(step)
        ids = [i for m in micro for i in m.ids]
        on_host = void.device.type == "cpu"
        if on_host and bool(edited.any()):
            raise ValueError(_EDITED)
        if on_host and bool(void):
            self._book(self._record(len(ids), skipped=True), self.epoch)
            return
        audited = self._audit_due()
        audit = play(step, self.validation, self.audit_permutations, self.step) if audited else None
        refreshed = self._attributed % self.refresh == 0
        direction = self._direction
        if direction is not None:
            scores = torch.cat([m.recording.scores for m in micro])
            scale = torch.stack(list(step.scale.values()))
            edited = edited | ((scale.max() - scale.min()).abs() > 1e-3 * scale.abs().max())
            if on_host and bool(edited.any()):
                raise ValueError("gradients were scaled by different factors, which needs schedule='midpoint'")
            scores = scores * scale.mean()
        else:
            grads = dict(zip(map(id, step.params), step.grads, strict=True))
            direction = self._form(step.state, step.params, [grads.get(id(p)) for p in self._params], self._place)
            scores = step.scores(direction.P, half=self.half)
        self._squeeze = direction.val_loss.ndim == 0
        total = direction.total if self._direction is None else direction.reach(step.params, step.grads)
        books = torch.stack([x.to(total).expand_as(total) for x in (direction.val_loss, total, direction.history, void)])
        record = self._record(len(ids), refreshed=refreshed, seconds=time.perf_counter() - started)
        if audit is not None:
            r, error = audit.compare(scores.squeeze(-1) if self._squeeze else scores)
            record.audit = Audit(r, error, audit.total.reshape(-1).tolist())
        self._attributed += 1
        told = self.ledger is not None and all(m.losses is not None for m in micro)
        losses = Readback(torch.cat([m.losses for m in micro])) if told else None
        self._pending.append(
            _Pending(ids, record, Readback(scores.detach()), Readback(books), Readback(edited), losses, self.epoch)
        )

    def _follow_scaling(self, step: Step) -> tuple[Tensor, Tensor]:
        """Finds by what the gradients were multiplied since the backward pass, for ``step``.

        Returns whether they are void (not finite, or a scaler's fused step found them so), and which were edited otherwise.
        """
        before, now = self._fingerprint, Fingerprint.of(step.grads)
        if before is None or len(before.l2) != len(now.l2):
            raise ValueError("gradients were added or removed between the backward pass and the step")
        scale, edited = before.scale_to(now)
        void = ~now.l1.isfinite().all()
        # a fused optimizer unscales inside its step, on what the scaler leaves with it
        if (factor := getattr(self.optimizer, "grad_scale", None)) is not None:
            inverse = factor.to(now.l2.device).reciprocal()
            scale = scale * inverse
            step.grads = [g * inverse.to(g.dtype) for g in step.grads]
        if (found := getattr(self.optimizer, "found_inf", None)) is not None:
            void = void | (found.to(void.device) > 0).any()
        step.scale = dict(zip(map(id, step.params), scale.unbind(), strict=True))
        return void, edited & ~void

    def _look_ahead(self, state: AdamState) -> Direction:
        """``P`` before the backward pass, from the gradient that history lets expect."""
        self._end_compiled()
        self._recorder.recording = None  # a step that was skipped left it; the validation pass is not to be recorded
        expected = [state.expected_gradient(p) for p in self._params]
        return self._form(state, self._params, expected, "lookahead")

    def _form(self, state: AdamState, params: list[Tensor], grads: list[Tensor | None], at: str) -> Direction:
        """``P`` for ``params``; ``grads`` are those of all trainable parameters."""
        val = self._val
        if val is None or self._attributed % self.refresh == 0:
            val = validation_gradient(state, self._params, grads, self.validation, at)
        keep = self.refresh > 1
        self._val = val if keep else None
        by_id = dict(zip(map(id, self._params), grads, strict=True))
        return form_direction(state, params, [by_id[id(p)] for p in params], val, self.rule, keep)

    # the books

    def _record(self, samples: int, *, refreshed: bool = False, skipped: bool = False, seconds: float = 0.0) -> StepRecord:
        lr = [float(g["lr"]) for g in self.optimizer.param_groups if not torch.is_tensor(g["lr"]) or g["lr"].device.type == "cpu"]
        return StepRecord(self.step, samples, lr, [], refreshed, [], [], [], self.coverage.share, skipped, seconds)

    def _drain(self, wait: bool = False) -> None:
        """Books the steps whose numbers have arrived; ``wait`` for all."""
        while self._pending and (wait or self._pending[0].books.ready):
            done = self._pending.pop(0)
            record, scores = done.record, done.scores.get().astype(np.float64)
            val_loss, total, history, void = done.books.get().astype(np.float64)
            record.skipped = bool(void.any())
            if record.skipped:
                self._book(record, done.epoch)
                continue
            if done.edited.get().any():
                raise ValueError(_EDITED)
            record.val_loss, record.total, record.history = val_loss.tolist(), total.tolist(), history.tolist()
            record.score_sum = scores.sum(0).tolist()
            self._totals.add(done.ids, scores)
            self._book(record, done.epoch, done.ids, scores, done.losses and done.losses.get())
            size = np.maximum(np.abs(total), np.sqrt((scores**2).sum(0)))
            off = np.divide(np.abs(scores.sum(0) - total), size, out=np.zeros_like(size), where=size > 0).max()
            if off > SELF_CHECK and not self._warned:
                self._warned = True
                warnings.warn(
                    f"step {record.step}: the scores add up to {record.score_sum}, but the step's gradient to {record.total}"
                    f" ({off:.0%} apart): part of the gradient did not come from the recorded samples",
                    UserWarning,
                    stacklevel=2,
                )

    def _book(self, record: StepRecord, epoch: int | None, ids: list[Hashable] = (), scores=None, losses=None) -> None:
        self.steps.append(record)
        if self.ledger is not None:
            self.ledger.add(record, ids, scores, losses, epoch, (self.every, self.refresh))

    def _settings(self) -> dict[str, Any]:
        """What a reader of the ledger wants to know of the run."""
        names = ("schedule", "rule", "every", "refresh", "audit_every", "audit_permutations")
        settings = {name: getattr(self, name) for name in names}
        settings |= {"model": type(self.model).__name__, "optimizer": type(self.optimizer).__name__}
        return settings | {"parameters": sum(p.numel() for p in self._params), "device": str(self._params[0].device)}

    def scores(self) -> SampleScores:
        """Per sample id: the sum over steps, and the mean of the scores standardised within their steps. Waits for the device."""
        self._drain(wait=True)
        return self._totals.read(self._squeeze)

    def top(self, k: int = 10, *, harmful: bool = False, target: int = 0) -> list[tuple[Hashable, float]]:
        """The ``k`` most helpful (or most harmful) sample ids with their total score for one target."""
        found = self.scores()
        total = found.total if found.total.ndim == 1 else found.total[:, target]
        order = np.argsort(total if harmful else -total, kind="stable")[:k]
        return [(found.ids[i], float(total[i])) for i in order]

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end with the same totals; call it between steps."""
        self._drain(wait=True)
        if self.ledger is not None:
            self.ledger.flush()  # a run that resumes from here finds the ledger complete up to this step
        return {
            "ledger": self.ledger and self.ledger.run,
            "step": self.step,
            "attributed": self._attributed,
            "squeeze": self._squeeze,
            "totals": self._totals.state_dict(),
            "steps": [asdict(s) for s in self.steps],
            "validation": self.validation.state_dict(),
            "val": None if self._val is None else (self._val.loss, [self._val.grads[id(p)] for p in self._params]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()`` of a run over the same model; cuts off what its ledger holds of later steps."""
        if self.ledger is not None:
            self.ledger.resume(state["ledger"] or self.ledger.run, state["step"], self._settings())
        self.step, self._attributed, self._squeeze = state["step"], state["attributed"], state["squeeze"]
        self._totals.load_state_dict(state["totals"])
        self.steps = [StepRecord(**{**s, "audit": s["audit"] and Audit(**s["audit"])}) for s in state["steps"]]
        self.validation.load_state_dict(state["validation"])
        if state["val"] is not None:
            loss, grads = state["val"]
            self._val = ValidationGradient(loss, dict(zip(map(id, self._params), grads, strict=True)))


_EDITED = (
    "gradients were edited element by element between the backward pass and the step (clipped by value, masked, noise added):"
    " no sample's share of that is defined; scaling and clip_grad_norm_ are fine"
)


def _open_writer(ledger: Any) -> "LedgerWriter | None":
    if ledger is None:
        return None
    from adam_ghost.ledger.writer import LedgerWriter

    return ledger if isinstance(ledger, LedgerWriter) else LedgerWriter(ledger)


def _check_arguments(model: Any, optimizer: Any, val_loss: Any, schedule: str, rule: str, audit_every: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(optimizer, (list, tuple, dict)):
        raise TypeError("optimizer must be the one Adam or AdamW that trains the model: several optimizers are not supported")
    state = AdamState.of(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Adam or AdamW, got {type(optimizer).__name__}")
    if not callable(val_loss):
        raise TypeError(f"val_loss must be callable and return the validation loss, got {type(val_loss).__name__}")
    for name, value, allowed in (("schedule", schedule, SCHEDULES), ("rule", rule, RULES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    foreign = [name for name, p in model.named_parameters() if p.requires_grad and p not in state]
    if foreign:
        raise ValueError(
            f"the optimizer does not hold {', '.join(foreign[:6])}: one optimizer must train all trainable parameters;"
            " freeze the others with requires_grad_(False)"
        )
    if is_compiled(model) and (schedule != "lookahead" or audit_every):
        raise ValueError(
            "the model is compiled: its layer calls cannot be recorded, which schedule='midpoint' and audit_every need;"
            " use schedule='lookahead' without audits, or compile nothing"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters")
