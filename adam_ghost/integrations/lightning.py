"""Lightning: one callback.

Trainer(callbacks=[AttributionCallback(val_loss, ledger="runs/today")]).fit(module, loader)
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from adam_ghost.inrun import InRun
from adam_ghost.integrations.ids import ID, has_ids, logged, take_ids
from adam_ghost.integrations.indices import Remembered, forget, remember
from adam_ghost.step.validation import check_callable


class AttributionCallback(Callback):
    """Attributes the steps of a ``LightningModule``.

    Several optimizers, which Lightning takes with manual optimization, share the parameters out: each steps once in a step, when
    the gradients of all are final.

    The scalars ``attribution/score_sum``, ``/total``, ``/val_loss``, ``/gap`` (how far the scores miss ``/total``) and
    ``/coverage`` go to the Trainer's loggers every ``log_every_n_steps``, the run's state into its checkpoints.
    ``training_step`` must call ``net`` once per batch.

    ``schedule="window"`` needs nothing more: batches are run again by ``training_step(batch, batch_idx)``, with its logging
    silenced, and kept until their window is swept.

    Args:
        val_loss: called with the module; returns the validation loss, ``[]`` or ``[K]``, with a graph.
        net: the name of the module's network, of which ``training_step`` makes the forward pass. None: the module itself where it
            has a ``forward``, otherwise the one part of it that holds all its trainable parameters.
        column: of the batch, with the ids; or ``ids``, a function of the batch that returns them. None: ``sample_id``, or places in
            the data set where batches have no such column and one process trains on a ``DataLoader``.
        options: of ``InRun``, but ``train_loss``, which is the module's.

    Raises:
        TypeError, ValueError: where training begins: no optimizer, no network that is the only one, or ``schedule="window"`` with
            manual optimization.
    """

    def __init__(
        self,
        val_loss: Callable[[LightningModule], Tensor],
        *,
        net: str | None = None,
        column: str | None = None,
        ids: Callable[[Any], Any] | None = None,
        **options: Any,
    ):
        check_callable(val_loss, None)
        self.val_loss, self.net, self.options = val_loss, net, options
        self.column, self.ids = column or ID, ids
        self._may_number = column is None and ids is None
        self._places: Remembered | None = None  # of the batches' samples in the data set
        self._loader: Any = None
        self._windows = options.get("schedule") == "window"
        self._logged = 0  # the last step that was
        self.run: InRun | None = None
        self._loaded: dict | None = None
        self._hooks: list[Any] = []
        self._unset: Callable[..., None] = _ignored  # takes what follows the loader off the module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # several processes, and overfitting, build the loader once more
        if stage == "fit" and self._may_number and trainer.world_size == 1 and not trainer.overfit_batches:  # type: ignore[attr-defined]
            source = trainer.fit_loop._data_source
            if source.is_module():  # it, or a LightningDataModule, has a method of that name
                made = getattr(source.instance, source.name)
                setattr(source.instance, source.name, lambda: self._remember(made()))
                self._unset = lambda: delattr(source.instance, source.name)
            else:
                self._remember(source.instance)

    def _remember(self, loader: Any) -> Any:
        self._places, self._loader = remember(loader), loader
        return loader

    def _ids(self, batch: Any) -> Any:
        """Of the batch's samples; a column with them is taken out of it."""
        if self.ids is not None:
            return self.ids(batch)
        if self._places is None or has_ids(batch, self.column):
            cure = ": let it be a dict with that column, or give the callback ids=, a function that returns a batch's ids"
            return take_ids(batch, self.column, cure)
        return self._places.given.popleft()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.optimizers:
            raise TypeError("an optimizer must train the module, configure_optimizers returned none")
        if self._windows and not pl_module.automatic_optimization:
            raise ValueError(
                "schedule='window' runs batches again by training_step, which must return the loss and leave the optimizer to"
                " Lightning: automatic_optimization is off"
            )
        model = pl_module.get_submodule(_find_net(pl_module) if self.net is None else self.net)
        # Lightning runs the forward and the backward pass inside the step, as its closure. Gradients must be final when the
        # run looks at them: a hook before the run's own calls the closure
        self._hooks = [each.register_step_pre_hook(_call_closure) for each in trainer.optimizers]
        val_loss, train_loss = lambda: self.val_loss(pl_module), lambda given: _train_loss(trainer, pl_module, given)
        self.run = InRun(model, trainer.optimizers, val_loss, train_loss=train_loss, **self.options)
        if self._loaded is not None:
            self.run.load_state_dict(self._loaded)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.run is not None:
            self.run.epoch = trainer.current_epoch
            ids = self._ids(batch)
            self.run.batch(ids, inputs=(copy.copy(batch), batch_idx) if self._windows else None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps = self.run.steps if self.run is not None else []
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set in its constructor
        if not (trainer.loggers and due and steps) or steps[-1].skipped or steps[-1].step == self._logged:
            return
        self._logged = steps[-1].step
        for logger in trainer.loggers:
            logger.log_metrics(logged(steps[-1]), step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.run is not None:
            self.run.close()
            for hook in self._hooks:
                hook.remove()
        self._unset()
        self._unset = _ignored
        if self._places is not None:
            forget(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


def _find_net(module: LightningModule) -> str:
    """The name of the part of ``module`` that ``training_step`` is taken to call; empty: itself."""
    if type(module).forward is not LightningModule.forward:
        return ""
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    parts = {name: {id(p) for p in part.parameters()} for name, part in module.named_children()}
    whole = [name for name, params in parts.items() if trained and trained <= params]
    if len(whole) != 1:
        named = ", ".join(name for name, params in parts.items() if params) or "it has none"
        raise ValueError(
            f"the module has no forward(), and no one part with all its trainable parameters ({named}): give it a forward() that"
            " training_step calls, or name the part with net="
        )
    return whole[0]


def _call_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        closure()
    return args[:1], {k: v for k, v in kwargs.items() if k != "closure"}


def _train_loss(trainer: Trainer, module: LightningModule, given: tuple[Any, int]) -> Tensor:
    """A batch's loss once more, without a trace in the logs."""
    batch, index = given
    with _unlogged(trainer, module):
        found = module.training_step(copy.copy(batch), index)  # which may take things out of it
    loss = found["loss"] if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor):
        raise ValueError("schedule='window': training_step returned no loss when the batch was run again")
    return loss


@contextmanager
def _unlogged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """What the module logs inside the block, by itself or by its loggers, goes nowhere."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    held: dict[str, Any] = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    vars(module).update(dict.fromkeys(("log", "log_dict"), _ignored))
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del vars(module)[name]
        vars(module).update(held)
        trainer.loggers = loggers


def _ignored(*args: Any, **kwargs: Any) -> None:
    pass
