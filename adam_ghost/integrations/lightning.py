"""Lightning: one callback; a batch is a dict with a column of ids.

Trainer(callbacks=[AttributionCallback(val_loss, ledger="runs/today")]).fit(module, loader)
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from adam_ghost.inrun import InRun
from adam_ghost.integrations.ids import ID, logged, take_ids


class AttributionCallback(Callback):
    """Attributes the steps of a ``LightningModule`` with one Adam or AdamW.

    The scalars ``attribution/score_sum``, ``/total``, ``/val_loss``, ``/gap`` (how far the scores miss ``/total``) and
    ``/coverage`` go to the Trainer's loggers every ``log_every_n_steps``, the run's state into its checkpoints.
    ``training_step`` must call ``net`` once per batch.

    Args:
        val_loss: called with the module; returns the validation loss, ``[]`` or ``[K]``, with a graph.
        net: the name of the module's network, of which ``training_step`` makes the forward pass; empty: the module's own call.
        column: of the batch, with the ids; or ``ids``, a function of the batch that returns them.
        options: of ``InRun``.
    """

    def __init__(
        self,
        val_loss: Callable[[LightningModule], Tensor],
        *,
        net: str = "",
        column: str = ID,
        ids: Callable[[Any], Any] | None = None,
        **options: Any,
    ):
        self.val_loss, self.net, self.options = val_loss, net, options
        cure = ": let it be a dict with that column, or give the callback ids=, a function that returns a batch's ids"
        self.ids = ids or (lambda batch: take_ids(batch, column, cure))
        self._logged = 0  # the last step that was
        self.run: InRun | None = None
        self._loaded: dict | None = None
        self._hook: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise TypeError(f"one Adam or AdamW must train the module, configure_optimizers returned {len(trainer.optimizers)}")
        # Lightning runs the forward and the backward pass inside the step, as its closure. Gradients must be final when the
        # run looks at them: a hook before the run's own calls the closure
        self._hook = trainer.optimizers[0].register_step_pre_hook(_call_closure)
        model = pl_module.get_submodule(self.net)
        self.run = InRun(model, trainer.optimizers[0], lambda: self.val_loss(pl_module), **self.options)
        if self._loaded is not None:
            self.run.load_state_dict(self._loaded)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.run is not None:
            self.run.epoch = trainer.current_epoch
            self.run.batch(self.ids(batch))

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
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.run is None else self.run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None


def _call_closure(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        return None
    with torch.enable_grad():
        closure()
    return args[:1], {k: v for k, v in kwargs.items() if k != "closure"}
