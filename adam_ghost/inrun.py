"""Attribution inside a training loop that somebody already has: two added lines, and training stays what it was."""

import io
import os
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adam_ghost.capture.rows import find_packing
from adam_ghost.ledger.books import Arrived, Audit, StepRecord
from adam_ghost.ledger.ids import normalise
from adam_ghost.optim import Optimizers, listed, read_optimizer
from adam_ghost.processes.find import find_world
from adam_ghost.processes.world import World
from adam_ghost.run.arguments import check_arguments, check_held, check_processes, window_options
from adam_ghost.run.attached import claim, weakly
from adam_ghost.run.compiled import is_compiled
from adam_ghost.run.readback import Books, Pending, PendingTokens, Readback
from adam_ghost.run.schedules import After, Ahead, AheadCompiled, Entry, Loop, MicroBatch, Schedule, Scored
from adam_ghost.run.steps import Steps
from adam_ghost.run.tokens import choose
from adam_ghost.run.totals import SampleScores, Totals
from adam_ghost.run.turns import Turns
from adam_ghost.run.window import Window
from adam_ghost.scores.cpu import multiplies_bfloat16
from adam_ghost.scores.forms import Asked
from adam_ghost.shapley import ShapleyValues, play
from adam_ghost.step.alone import alone, tolerance
from adam_ghost.step.coverage import Coverage, Joined, refuse_mixed_samples, share_of
from adam_ghost.step.fingerprint import EDITED, GradientWatch
from adam_ghost.step.step import Step, follow_scaling, gather_step, held_by, join, plain_precision
from adam_ghost.step.validation import Validation
from adam_ghost.step.whole_pass import may_pass
from adam_ghost.warn import warn

if TYPE_CHECKING:
    from adam_ghost.ledger.writer import LedgerWriter


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
    take ``lookahead``, without graph breaks: before the first forward pass of each kind (modes, shapes) the model runs once
    in eager mode, which shows in which layers row ``i`` is sample ``i``; these are scored, the parameters of all others are
    named and left out. The first step, which has no history, is not attributed, which a warning says.

    Where several processes train the model (``DistributedDataParallel``), all of them build the run and call ``batch``, each with
    its own samples' ids, or ``[]``. Scores are those of one process with the whole batch; each process has its own samples', the
    ledger all. An error in one process's step reaches all.

    A sample's share of a step is the gradient that comes through its rows of the batch. Where the loss compares samples with
    each other (contrastive losses, in-batch negatives, mixup), the share of a pair's gradient goes to the sample whose rows it
    comes through, and none to its partner as such.

    Args:
        model: called with the batch along dimension 0: every tensor among its arguments whose first dimension is as long as the
            first one's is taken for samples, a table of that many rows too: make such a table a buffer of the model.
        optimizer: the one that trains all of the model's trainable parameters, or a list of several that share them out. Those
            step one after another, each once in a step, when all gradients are final: attribution happens before the first of
            them moves weights (with a gradient scaler, ``unscale_`` all of them before). Where an optimizer does not step although
            its parameters have gradients, the run raises, unless its gradients were not finite: then the others' are scored.
        val_loss: returns the loss to attribute, ``[]`` or ``[K]``, with a graph; may draw a new batch each time. It runs the
            model in whatever mode it is in, which is that of training unless ``val_loss`` calls ``model.eval()``: the mode is
            put back; and outside of autocast, unless it enters that. The model's buffers and plain attributes, and the random
            streams of PyTorch, NumPy and Python, are put back too.
        schedule: ``midpoint`` (faithful: the validation gradient at the midpoint of each step, layer calls kept until
            then), ``gauss`` (most faithful: at two points of each step, for a second validation pass) or ``lookahead``
            (fastest: ``P`` predicted before the backward pass from Adam's history, nothing kept; the first ten steps, which
            have no such history, go the midpoint's way): what a sample did in its step. ``window``: what it did to the run,
            its effect carried through momentum and later gradients to the end of a window of steps (docs/method.md, 6); the
            scores of a window come when the steps ahead of it are done.
        rule: how the optimizer's nonlinearity is linearized, as in ``attribute``.
        every: attribute every that many optimizer steps, or windows; the others are plain training.
        refresh: take a new validation gradient every that many attributed steps.
        audit_every: compare every that many attributed steps with the exact game (``exact_shapley``; costs
            ``2 * audit_permutations * n`` validation losses); the validation batch should be fixed then. The game is played
            with the recorded gradients; whether these are their samples' is told by two samples, whose gradients are computed
            alone (``audit.alone``, the relative difference; None where the model's outputs have no batch).
            In ``window`` it counts windows: ``audit_samples`` samples of the window's first step are left out one by one and
            training goes on without them to the window's end (that many times ``window + ahead`` steps' time); a warning says
            where windows are too long for their linearization.
        window: steps whose samples are scored together, by the validation loss at the window's end; ``auto``: chosen by audits.
        ahead: steps that the end lies beyond the last of them, so that all samples get an outlook; they are swept twice.
        bounded: in ``window``, take Adam's derivative with a second moment of at least what one sample's share makes of it. Without
            a history of gradients its step is nearly their sign, and the plain derivative says nothing of a change: where
            gradients cancel, the credit of the first steps can be anything.
        train_loss: in ``window``, a function of what ``run.batch(ids, inputs=...)`` is given that returns the loss which the
            loop calls ``backward()`` on, once per micro-batch, up to a constant factor. Random numbers that it draws, of torch,
            come out as in the loop where it begins right after ``run.batch``; those that the model draws do anyhow.
        feedback: how later gradients react, in ``window``: ``differences`` of gradients (any smooth code, error 1e-3 in float32),
            ``double`` backward or ``forward`` mode (exact, where the code can be differentiated twice), ``gauss-newton`` on a
            quarter of each batch (a third of the price), ``none``; ``auto``: differences, or double backward where the loss has
            kinks (ReLU, max pooling).
        memory: bytes that kept steps may take on the device, such as ``8GB``; the rest goes to pinned memory, or on a CPU to
            files. A window keeps one gradient per step and the optimizer's state at every eighth or so.
        half: in ``midpoint``, round the operands of the scores' large float32 products to bfloat16 (sums stay in float32),
            which moved the scores of real texts by less than a thousandth. None: where it is faster, on CPUs that multiply
            bfloat16.
        val_split: of several processes, each evaluates its own part of the validation loss, whose mean over the processes is
            meant. Otherwise all evaluate the same, with the same random numbers.
        strict: raise where a parameter's gradient cannot be attributed, instead of warning once.
        fallback: score parameters that the layer calls lose by a forward-mode pass of the whole model in each step, as
            ``LayerCache`` does; False: leave them out, and name them. None: where it can, which is not where ``fully_shard`` keeps
            weights in parts.
        ledger: a folder to write every score and every step's books to (``adam_ghost.open_ledger`` reads it), or a
            ``LedgerWriter`` with more choices. ``run.epoch`` is written beside each step, if set.
        tokens: also score every token by itself, into the ledger: of all samples in every that many attributed steps, the first
            among them, or of the samples of these ids whenever they come. For ``midpoint`` and ``gauss``, and models whose
            layers all have tokens at dimension 1.

    Raises:
        TypeError, ValueError: on construction, naming the argument, before anything is changed. A ledger of an earlier run is
            refused there, or with the first batch where a checkpoint of that run was made, which ``load_state_dict`` may bring.
        RuntimeError, ValueError: by ``optimizer.step()``, where a step cannot be scored: before it is taken, in ``window`` after
            the one with which a window ends. Weights, moments and random numbers are those of a training without the run, which
            goes on when the run is closed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        val_loss: Callable[[], Tensor],
        schedule: str = "midpoint",
        *,
        rule: str | None = None,
        every: int = 1,
        refresh: int = 1,
        audit_every: int | None = None,
        audit_permutations: int = 8,
        window: int | str = 32,
        ahead: int = 32,
        bounded: bool = True,
        train_loss: Callable[[Any], Tensor] | None = None,
        feedback: str = "auto",
        memory: str | int | None = None,
        audit_samples: int = 4,
        half: bool | None = None,
        val_split: bool = False,
        strict: bool = False,
        fallback: bool | None = None,
        ledger: "str | os.PathLike | LedgerWriter | None" = None,
        tokens: int | Sequence[Hashable] | None = None,
    ):
        rule = check_arguments(model, optimizer, val_loss, schedule, rule, audit_every)
        given = {"window": window, "ahead": ahead, "bounded": bounded, "feedback": feedback, "memory": memory}
        windows = window_options(schedule, train_loss, given | {"audit_samples": audit_samples}, audit_every, refresh, model)
        for name, value in (("every", every), ("refresh", refresh), ("audit_every", 1 if audit_every is None else audit_every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        model, world = find_world(model)
        if world.size > 1:
            check_processes(model, optimizer, schedule, feedback, world, audit_every)
        fallback = may_pass(fallback, world)
        self._tokens = choose(tokens, schedule, ledger, world)
        self.model, self.optimizer = model, optimizer
        self._optimizers: list[torch.optim.Optimizer] = listed(optimizer)
        self.audit_every, self.audit_permutations = audit_every, audit_permutations
        self.coverage = Coverage(strict)
        self.steps = Steps()  # the newest attributed ones, as far as their numbers have arrived
        self.epoch: int | None = None  # for the ledger
        self._named = dict(model.named_parameters())
        self._closed = False
        claim(model, self)
        params = {name: p for name, p in self._named.items() if p.requires_grad}
        half = multiplies_bfloat16() if half is None else half
        validation, watch = Validation(val_loss, model, world, val_split), GradientWatch(params, world)
        self._loop = Loop(model, optimizer, params, validation, watch, rule, every, refresh, half, world, fallback)
        self._schedule_name = schedule
        if windows is not None:
            self._schedule: Schedule = Window(self._loop, windows, self.coverage)
        else:
            self._schedule = _step_schedule(schedule, self._loop)
        self._totals = Totals()
        self._books = Books(self.coverage)
        self._skipped: list[Arrived] = []  # which wait for the scores of steps before them
        self._squeeze = True  # whether the validation loss is a scalar
        self._seconds = 0.0  # of the host, in this step
        self.ledger = _open_writer(ledger)
        self._turns = Turns(len(self._optimizers) > 1)
        if self.ledger is not None:
            self.ledger.claim(self)
            self.ledger.share(world.first(self.ledger.run), world.size)
            if any(world.gather(self.ledger.cannot_go_on())):
                self._closed = True  # the model and the folder are free for another one
                self.ledger.close()
                self.ledger.refuse_earlier()
        before, after = weakly(self._before_step), weakly(self._after_step)
        self._handles = [*world.follow(model), *(each.register_step_pre_hook(before) for each in self._optimizers)]
        self._handles += [each.register_step_post_hook(after) for each in self._optimizers]
        self._attach()

    def _attach(self) -> None:
        self._schedule.attach()
        # a run that is deleted without close() leaves nothing behind either; at the interpreter's end nothing needs to be done
        self._finalizer = weakref.finalize(self, _leave, self._schedule, self._handles, self.ledger)
        self._finalizer.atexit = False

    def parameters(self) -> list[Tensor]:
        """The model's, while the run is attached to it."""
        return [] if self._closed else list(self._named.values())

    @property
    def _world(self) -> World:
        return self._loop.world

    @property
    def step(self) -> int:
        """Steps of the optimizer since the construction, or since that of the run that was resumed."""
        return self._loop.step

    def __enter__(self) -> "InRun":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes everything off the model and the optimizer; what was scored stays readable."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as last:
            last.callback(self._finalizer)
            last.callback(self._books.drain, self._book, wait=True)
            self._end_step()
            self._take(self._schedule.finish)

    def flush(self) -> None:
        """Waits until every step so far is booked, and on the disk where there is a ledger."""
        self._books.drain(self._book, wait=True)
        if self.ledger is not None:
            self.ledger.flush()

    # the user's loop

    def batch(
        self,
        ids: Sequence[Hashable] | Tensor,
        offsets: Tensor | None = None,
        *,
        samples: Tensor | None = None,
        views: int = 1,
        inputs: Any = None,
    ) -> AbstractContextManager:
        """Names the samples of the next forward pass; before each micro-batch, if gradients are accumulated.

        The model's forward pass is followed. A loss outside of it that uses the model's weights itself (``F.linear(hidden,
        model.head.weight)``) is followed inside ``with run.batch(ids):``.

        Args:
            ids: one integer or string per sample, in the order of the batch.
            offsets: for samples packed in rows, ``[len(ids) + 1]`` integers: sample ``i`` is the tokens
                ``offsets[i]:offsets[i + 1]`` of all rows in a line (``cu_seqlens``). That the model keeps them apart (by a mask,
                by segments of its attention) is taken for granted; an audit looks.
            samples: the same for samples in any places: of each token of all rows, the place of its sample in ``ids``, -1 where
                it is padding.
            views: rows of the model's batch that each sample has: all samples' first rows in their order, then their second
                ones, as the chosen and the rejected answers of pairs, or two crops. A sample's score is that of all its rows.
            inputs: in ``window``, what ``train_loss`` computes this micro-batch's loss from; kept until its window is swept.

        Raises:
            TypeError: an id is something else.
            TypeError, ValueError: ids that are none, wrong lengths, a BatchNorm in training mode, parameters that were frozen or
                unfrozen where that cannot be followed.
        """
        if self._closed:
            raise RuntimeError("this run is closed")
        # lookahead takes its validation gradient here
        exchanging = isinstance(self._schedule, Ahead) and self._schedule.due()
        with self._world.together() if exchanging else nullcontext():
            return self._announce(ids, offsets, samples, views, inputs)

    def _announce(
        self, ids: Sequence[Hashable] | Tensor, offsets: Tensor | None, samples: Tensor | None, views: int, inputs: Any
    ) -> AbstractContextManager[None]:
        if self._world.apart and not self._schedule.per_step:
            raise RuntimeError("a process failed, others may have kept other steps than it: close this run, build a new one")
        ids = normalise(ids)
        packing = find_packing(offsets, samples, next(iter(self._loop.params.values())).device, len(ids))
        if not isinstance(views, int) or views < 1:
            raise ValueError(f"views must be a positive integer, got {views!r}")
        self._end_step()
        if not self._schedule.due():
            return nullcontext()
        started = time.perf_counter()
        audit = self._audit_due()
        if packing is not None and is_compiled(self.model):
            raise ValueError("a compiled model cannot be used with samples packed in rows")
        if views > 1 and (audit or packing is not None or is_compiled(self.model) or not self._schedule.per_step):
            what = "audit_every" if audit else "a compiled model" if packing is None else "offsets or samples"
            what = what if self._schedule.per_step else "schedule='window'"
            raise ValueError(f"{what} cannot be used with samples of several rows, got views={views}")
        tokens = self._tokens.places(ids, self._loop.attributed)
        if tokens and views > 1:
            raise ValueError(f"tokens cannot be used with samples of several rows, got views={views}")
        if self.ledger is not None:
            self.ledger.begin(ids, self._settings)
        micro = MicroBatch(ids, packing, audit, inputs, views=views, tokens=tokens)
        with self._loop.validation.tree.steady() as modules:
            refuse_mixed_samples(modules)
            self._settle()
            self._follow_freezing()
            with plain_precision(self.model):  # which may take a validation gradient
                self._schedule.open(micro, first=not self._schedule.pending())
        self._seconds += time.perf_counter() - started
        return self._schedule.followed()

    def losses(self, losses: Tensor) -> None:
        """Tells the ledger each sample's share of the training loss, ``[n]``; after the forward pass that ``batch`` announced."""
        micro = self._schedule.pending()
        if micro:
            if losses.shape != (len(micro[-1].ids),):
                raise ValueError(f"losses must be [{len(micro[-1].ids)}], one per id, got {list(losses.shape)}")
            micro[-1].losses = losses.detach()

    def _audit_due(self) -> bool:
        if not self._schedule.per_step:  # windows audit their own sweeps
            return False
        return self.audit_every is not None and self._loop.attributed % self.audit_every == self.audit_every - 1

    def _settle(self) -> None:
        """Drops micro-batches without gradients: a scaler skipped their step, or the loop went on to the next batch."""
        watch = self._loop.watch
        dropped = self._schedule.drop()
        # passes before the last of a step leave nothing in .grad where parameters are sharded
        gone = not self._world.sharded or watch.fingerprint is not None
        if gone and self._schedule.pending() and (watch.fingerprint is None or watch.fingerprint.cleared(watch.grads())):
            self._world.meet("a step that is skipped")
            self._schedule.forget()
            watch.fingerprint = None
            dropped += self._schedule.drop()
        if dropped:
            self._skip(dropped)

    def _changed(self) -> list[str]:
        """The parameters that were frozen or unfrozen since the run last looked."""
        return [name for name, p in self._named.items() if p.requires_grad != (name in self._loop.params)]

    def _follow_freezing(self) -> None:
        """Takes up what is trained from here on; refuses what it cannot follow."""
        changed = self._changed()
        if not changed:
            return
        shown, loop = ", ".join(changed[:6]), self._loop
        if self._schedule.pending():
            raise ValueError(f"frozen or unfrozen between two micro-batches of a step: {shown}; do it between two steps")
        if not self._schedule.per_step:
            raise ValueError(f"frozen or unfrozen in mid-run: {shown}; schedule='window' needs a new run for that")
        params = {name: p for name, p in self._named.items() if p.requires_grad}
        if not params:
            raise ValueError("the model has no trainable parameters any more")
        check_held(params, read_optimizer(self.optimizer))
        self._finalizer.detach()
        self._schedule.detach()
        loop.params.clear()
        loop.params.update(params)
        self._schedule = _step_schedule(self._schedule_name, loop)
        self._attach()

    # the step

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if any(closure is not None for closure in (*args[1:], *kwargs.values())):
            raise ValueError("optimizer.step(closure) computes gradients inside the step: call backward() before step()")
        if self._only_makes_state(optimizer):
            return
        if self._turns.awaits(optimizer):
            with self._withdrawing():
                return self._turns.check(optimizer)
        if len(self._optimizers) > 1 and not _has_gradients(optimizer):
            return  # it moves nothing
        self._end_step()
        dropped = self._schedule.drop()
        if dropped:
            self._skip(dropped)
        micro = self._schedule.collect()
        due = self._schedule.due()
        self._loop.step += 1
        stepping = {each for each in self._optimizers if each is optimizer or _has_gradients(each)}
        if not due or micro is None:
            self._turns.begin(stepping)
        if due:
            with self._world.together():
                self._score(micro, dropped, stepping)

    def _only_makes_state(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is no step of training: torch.distributed.checkpoint takes one by zeros to give an optimizer its state."""
        if optimizer.state or self._schedule.pending() or any(group.get("lr") != 0 for group in optimizer.param_groups):
            return False
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return not any(bool(g.any()) for g in self._world.parts(grads))

    def _score(self, micro: list[MicroBatch] | None, dropped: list[MicroBatch], stepping: set[torch.optim.Optimizer]) -> None:
        """Scores the step about to be taken, of which these micro-batches arrived, and those dropped did not."""
        if micro is None:
            warn(f"step {self.step} has no scores: a compiled model's are foreseen from history, and the optimizer has none yet")
            return
        if not micro:
            what = "a backward pass through the recorded forward pass" if dropped else "a recorded forward pass"
            cure = (
                ": call run.batch(ids) before the forward pass of the very module that the run was built on; a part of it that is"
                " called by itself is not seen (in Lightning, name it: net=)"
            )
            cure = "" if dropped else cure
            raise RuntimeError(f"optimizer.step() without {what}{cure}")
        if (gone := next((m.recording.deviation for m in micro if m.recording and m.recording.deviation), "")) and not self._closed:
            self.coverage.tell("deviation", f"step {self.step}: {gone}")
            self._loop.watch.fingerprint, self._seconds = None, 0.0
            return self._skip(micro)
        started = time.perf_counter() - self._seconds
        try:
            with plain_precision(self.model), self._loop.validation.tree.steady():
                self._attribute(micro, started)
        finally:
            self._loop.watch.fingerprint, self._seconds = None, 0.0
        self._turns.begin(stepping)

    @contextmanager
    def _withdrawing(self) -> Iterator[None]:
        """Where the step that was begun turns out to be another one, its scores are withdrawn."""
        try:
            yield
        except RuntimeError:
            self._turns.clear()
            self._schedule.withdraw()
            if self._schedule.per_step:  # else it is not in the books yet
                self._books.withdraw()
            raise

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        with self._withdrawing():
            last = self._turns.taken(optimizer)
        if last:
            self._sweep()

    def _end_step(self) -> None:
        """The step that was begun, if any, is over."""
        with self._withdrawing():
            begun = self._turns.end(self.step)
        if begun:
            self._sweep()

    def _sweep(self) -> None:
        self._take(self._schedule.swept)

    def _take(self, scored: Callable[[], Iterable[tuple[Entry, Scored | None]]]) -> None:
        """Enters what is ``scored`` of earlier steps: all processes sweep a window, or none."""
        if self._schedule.per_step or not self._world.apart:
            with nullcontext() if self._schedule.per_step else self._world.together(), plain_precision(self.model):
                self._finish(scored() if self._world.size == 1 else list(scored()))  # an error is known in all before they join
        elif self._closed and (waiting := self._schedule.waiting()) is not None:
            warn(f"steps {waiting} to {self.step} have no scores: a process failed before their window was swept")

    def _attribute(self, micro: list[MicroBatch], started: float) -> None:
        loop = self._loop
        loop.world.settle()
        loop.world.check_reduced()
        if loop.watch.fingerprint is None:  # a backward pass that an error ended
            raise RuntimeError("optimizer.step() without a whole backward pass through the recorded forward pass")
        recordings = [m.recording for m in micro if m.recording is not None]
        if changed := self._changed():
            raise ValueError(f"frozen or unfrozen between run.batch and the step: {', '.join(changed[:6])}; do it before run.batch")
        passes = [m.whole for m in micro if loop.fallback]
        named = loop.validation.tree.named_parameters()
        step = gather_step(named, read_optimizer(self.optimizer), recordings, self.coverage, passes, loop.world)
        if new := [name for name, p in step.params.items() if loop.params.get(name) is not p]:
            raise ValueError(f"new parameters since the run was built: {', '.join(new[:6])}; close it and build another")
        before = loop.watch.fingerprint
        if len(self._optimizers) > 1 and not isinstance(self._schedule, Ahead):
            # an optimizer that rests, its gradients cleared; foreseen scores are of all parameters in one
            before = before.only(step.grads)
        edited, each_void = follow_scaling(step, before, self._optimizers, self._schedule.foreseen)
        void = each_void.any()
        if void.device.type == "cpu":  # where looking costs no synchronisation
            if bool(edited.any()):
                raise ValueError(EDITED)
            if bool(void):
                # an optimizer that is skipped leaves its parameters where they are
                left = [o for o, gone in zip(self._optimizers, each_void.tolist(), strict=True) if not gone]
                names = [] if isinstance(self._schedule, Ahead) else [k for o in left for k in held_by(o, step.params)]
                if not names:
                    return self._skip(micro)
                step, void = step.only(names), torch.zeros_like(void)
        audit = self._play(step, micro) if self._audit_due() else None
        ids = [i for m in micro for i in m.ids]
        losses = [m.losses for m in micro if m.losses is not None]
        told = torch.cat(losses) if self.ledger is not None and len(losses) == len(micro) else None
        entry = Entry(ids, self._record(len(ids), refreshed=loop.refreshes), told)
        found = self._schedule.score(step, micro, edited, entry, void)
        for each in self._optimizers:
            if names := list(step.params) if len(self._optimizers) == 1 else held_by(each, step.params):
                self._turns.keep(each, {name: step.params[name] for name in names})
        loop.attributed += 1
        entry.record.coverage = self.coverage.share
        if found is not None and step.whole:
            entry.record.by_passes = share_of(step.whole, step.grads)
            entry.record.passes = found.total.numel() * len(step.passes)
        entry.record.seconds = time.perf_counter() - started
        if found is None:
            return
        parts = found.scores.split([len(m.ids) if m.packing else m.rows for m in micro])
        found = found._replace(scores=torch.cat([m.by_sample(x) for m, x in zip(micro, parts, strict=True)]))
        alone = loop.world.size == 1
        if alone and found.unexplained is not None and found.accounted is not None and found.scores.device.type == "cpu":
            self.coverage.blame(Joined.of(found.scores.detach().numpy()), found.accounted.numpy(), found.unexplained)
        if audit is not None:
            game, apart = audit
            r, error = game.compare(found.scores if found.val_loss.ndim else found.scores.squeeze(-1))
            entry.record.audit = Audit(r, error, game.total.reshape(-1).tolist(), apart)
        tokens = [
            PendingTokens(m.ids, part.places, Readback(part.line.detach()), Readback(part.offsets))
            for m, part in zip(micro, found.tokens, strict=False)
            if part is not None
        ]
        self._enter(entry, found, void, tokens)

    def _play(self, step: Step, micro: list[MicroBatch]) -> tuple[ShapleyValues, float | None]:
        """The step's exact game, and how far recorded gradients are from those of samples alone, of the first micro-batch."""
        first, validation = micro[0], self._loop.validation
        apart = None
        if first.whole is not None and first.recording is not None:
            asked = Asked(first.recording.batch_size, first.packing)
            apart = alone(step, first.whole, asked, validation, self.step)
            if apart is not None and not apart <= tolerance(first.whole):
                self.coverage.tell(
                    "alone",
                    f"step {self.step}: the gradients of samples computed alone differ from the recorded ones by {apart:.0%}: the"
                    " model mixes the samples, or its batch was followed wrongly (a torch.autograd.Function of your own, a"
                    " second argument that is no batch); the audit's r says nothing of that",
                )
        return play(step, validation, self.audit_permutations, self.step), apart

    def _finish(self, found: Iterable[tuple[Entry, Scored | None]]) -> None:
        try:
            for entry, scored in found:
                self._book_skipped(entry.record.step)
                if scored is None:
                    entry.record.skipped = True
                    self._books.add(Arrived(entry.record))
                else:
                    self._enter(entry, scored, torch.zeros((), device=scored.total.device))
        finally:
            self._book_skipped(self._schedule.waiting())
            self._books.drain(self._book)

    def _enter(self, entry: Entry, found: Scored, void: Tensor, tokens: Sequence[PendingTokens] = ()) -> None:
        self._squeeze = found.val_loss.ndim == 0
        like = found.total
        accounted = like if found.accounted is None else found.accounted
        rows = (found.val_loss, found.total, found.history, void, accounted)
        numbers = torch.stack([x.to(like).expand_as(like) for x in rows])
        told = None if entry.losses is None else Readback(entry.losses)
        joined = None if self._world.size == 1 else Readback(join(self._world, found.scores, found.val_loss))
        read = Readback(found.scores.detach()), Readback(numbers), joined, Readback(found.edited)
        self._books.add(Pending(entry.ids, entry.record, *read, found.accounted is not None, told, found.at, tokens))

    # the books

    def _record(self, samples: int, *, refreshed: bool = False, skipped: bool = False, seconds: float = 0.0) -> StepRecord:
        groups = [group for each in self._optimizers for group in each.param_groups]
        lr = [float(g["lr"]) for g in groups if not torch.is_tensor(g["lr"]) or g["lr"].device.type == "cpu"]
        record = StepRecord(self.step, samples, lr, [], refreshed, [], [], [], self.coverage.share, skipped, seconds)
        record.epoch, record.every, record.refresh = self.epoch, self._loop.every, self._loop.refresh
        return record

    def _skip(self, micro: list[MicroBatch]) -> None:
        self._skipped.append(Arrived(self._record(sum(len(m.ids) for m in micro), skipped=True)))
        self._book_skipped(self._schedule.waiting())

    def _book_skipped(self, before: int | None) -> None:
        """Books the steps that were skipped before step ``before``, whose turn it is; all where that is None."""
        while self._skipped and (before is None or self._skipped[0].record.step < before):
            self._books.add(self._skipped.pop(0))

    def _book(self, step: Arrived) -> None:
        self.steps.append(step.record)
        if step.scores is not None:
            self._totals.add(step.ids, step.scores, step.moments)
        if self.ledger is not None:
            self.ledger.add(step)

    def _settings(self) -> dict[str, Any]:
        """What a reader of the ledger wants to know of the run."""
        loop, params = self._loop, self._loop.params.values()
        return {
            "schedule": self._schedule_name,
            "rule": loop.rule,
            "every": loop.every,
            "refresh": loop.refresh,
            "audit_every": self.audit_every,
            "audit_permutations": self.audit_permutations,
            "model": type(self.model).__name__,
            "optimizer": ", ".join(type(each).__name__ for each in self._optimizers),
            "parameters": sum(p.numel() for p in params),
            "device": str(next(iter(params)).device),
        }

    def scores(self) -> SampleScores:
        """Per sample id: the sum over steps, and the mean of the scores standardised within their steps. Waits for the device.

        Where several processes train the model, of the samples that this process has had; the ledger has all.
        """
        self._books.drain(self._book, wait=True)
        return self._totals.read(self._squeeze)

    def top(
        self,
        k: int = 10,
        *,
        harmful: bool = False,
        target: int = 0,
        value: str = "standardized",
        steps: tuple[int, int] | None = None,
    ) -> list[tuple[Hashable, float]]:
        """The ``k`` most helpful (or most harmful) sample ids with their value for one target; empty before the first step.

        The first steps, in which no linearization is exact, weigh most in a sum of one-step scores: of 1,000 digits, a fifth
        with a wrong label, totals tell those with AUROC 0.77, standardized scores with 0.79, totals from the eleventh step on
        with 0.79 (means of five trainings; ``docs/evidence.md``). So ``standardized`` finds bad samples;
        totals are in the validation loss's unit, and those of windows are what training without a sample would change.

        Args:
            k: how many.
            harmful: the other end.
            target: which of ``K`` validation losses.
            value: ``standardized``, the mean of the scores standardised within their steps, or ``total``, their sum.
            steps: the first and the last step that count, both included; only a ledger remembers single steps.

        Raises:
            ValueError: ``value`` or ``target`` is not there, or ``steps`` is asked of a run without a ledger.
        """
        if steps is not None and self.ledger is None:
            raise ValueError(f"steps={steps} needs a run with ledger=: without one, only the sums over all steps are kept")
        found = self.scores()
        if steps is None or self.ledger is None or not found.ids:
            return found.top(k, harmful, target, value)
        self.flush()
        from adam_ghost.ledger.reader import open_ledger

        with open_ledger(self.ledger.folder) as ledger:
            table = ledger.top(k, harmful=harmful, target=target, value=value, steps=steps)
        return list(zip(table["sample"].to_pylist(), table["value"].to_pylist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end with the same totals; call it between steps.

        One value of bytes, whatever the run has seen: ``torch.distributed.checkpoint`` loads it into a run that has seen nothing.
        Where several processes train the model, all of them call it, and all get the same: what all have. Any number of processes
        can go on from there.
        """
        self.flush()  # a run that resumes from here finds the ledger complete up to this step
        positions = self._world.gather(None if self.ledger is None else self.ledger.checkpoint())
        state = {
            "of": self._of(),
            "ledger": _join_positions([p for p in positions if p is not None]),
            "step": self.step,
            "attributed": self._loop.attributed,
            "squeeze": self._squeeze,
            "totals": Totals.join(self._world.gather(self._totals.state_dict())),
            "steps": self.steps.state_dict(),
            "validation": self._world.gather(self._loop.validation.state_dict()),
            "schedule": self._schedule.state_dict(),
            "books": self._books.state_dict(),
        }
        packed = io.BytesIO()
        torch.save(state, packed)
        return {"run": packed.getvalue()}

    def _of(self) -> str:
        return f"a model of {sum(p.numel() for p in self._named.values()):,} parameters in {len(self._named)} tensors"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from ``state_dict()`` of a run over the same model; cuts off what its ledger holds of later steps.

        Of several processes the first goes on with the totals of all.

        Raises:
            ValueError: ``state`` is something else, or another model's, or the ledger is another run's.
        """
        if not isinstance(state, dict) or set(state) != {"run"} or not isinstance(state["run"], bytes):
            what = f"the keys {sorted(map(str, state))}" if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state must be what InRun.state_dict() returned, the bytes of a run; got {what}")
        state = torch.load(io.BytesIO(state["run"]), map_location="cpu", weights_only=True)
        if state["of"] != self._of():
            raise ValueError(f"state is of a run over {state['of']}, and this model is {self._of()}: build a new run for it")
        if self.ledger is not None:
            self.ledger.resume(state["ledger"], self._settings())
        self._loop.step, self._loop.attributed, self._squeeze = state["step"], state["attributed"], state["squeeze"]
        if self._world.rank == 0:
            self._totals.load_state_dict(state["totals"])
        self.steps.load_state_dict(state["steps"])
        streams = state["validation"]
        here = self._world.rank if self._loop.validation.split else 0
        self._loop.validation.load_state_dict(streams[here] if here < len(streams) else None)
        self._schedule.load_state_dict(state["schedule"])
        self._books.load_state_dict(state["books"])


def _open_writer(ledger: Any) -> "LedgerWriter | None":
    if ledger is None:
        return None
    from adam_ghost.ledger.writer import LedgerWriter

    if not isinstance(ledger, (str, os.PathLike, LedgerWriter)):
        raise TypeError(f"ledger must be the folder to write to, or a LedgerWriter, got {type(ledger).__name__}")
    return ledger if isinstance(ledger, LedgerWriter) else LedgerWriter(Path(ledger))


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _leave(schedule: Schedule, handles: list[Any], ledger: Any) -> None:
    """Takes a run off its model and its optimizer, and closes its ledger."""
    schedule.detach()
    for handle in handles:
        handle.remove()
    if ledger is not None:
        ledger.close()


def _step_schedule(name: str, loop: Loop) -> Schedule:
    if name == "lookahead":
        return AheadCompiled(loop) if is_compiled(loop.model) else Ahead(loop)
    return After(loop, name)


def _join_positions(positions: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Where the ledger stands, from what each process says of the ranks that it looks after; None: there is no ledger."""
    if not positions:
        return None
    ranks = max(len(p["parts"]) for p in positions)
    parts = [max((p["parts"][rank] for p in positions if rank < len(p["parts"])), default=0) for rank in range(ranks)]
    return {"run": positions[0]["run"], "parts": parts}
