"""Hugging Face's ``Trainer``: each step is taken by the samples of its batch that serve a validation loss.

SelectionCallback(val_loss, fraction=0.5).attach(trainer)
trainer.train()
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from adam_ghost.layer_cache import LayerCache
from adam_ghost.step.validation import check_callable
from adam_ghost.use.selecting import Selection, select


class SelectionCallback(TrainerCallback):
    """Calls ``select`` between a ``Trainer``'s backward pass and its clipping.

    ``per_device_train_batch_size`` is then the number of candidates. The Trainer's logs get ``selection/chosen``, the share of the
    samples that took part, ``selection/score_sum`` and ``selection/score_left_out``: what all of them and the others would have
    taken off the validation loss. An ``AttributionCallback`` on the same Trainer refuses the steps, whose gradient was edited.

    Args:
        val_loss: called with the model; returns the validation loss, a scalar with a graph.
        fraction: as ``select``'s: of the samples to choose, or None to weigh them.
        redundancy: as ``select``'s.

    Raises:
        ValueError: where training begins, with gradients that are accumulated, scaled (fp16) or of several processes, or with a
            Trainer that ``attach`` was not told of.
    """

    def __init__(self, val_loss: Callable[[nn.Module], Tensor], *, fraction: float | None = 0.5, redundancy: bool = True):
        check_callable(val_loss, None)
        self.val_loss, self.fraction, self.redundancy = val_loss, fraction, redundancy
        self.last: Selection | None = None  # of the newest step
        self._trainer: Any = None
        self._training_step: Any = None  # the Trainer's own
        self._cache: LayerCache | None = None

    def attach(self, trainer: Any) -> "SelectionCallback":
        """Adds itself to ``trainer``, before what reports its logs, around its ``training_step``."""
        self._trainer, self._training_step = trainer, trainer.training_step
        trainer.training_step = self._choose
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._trainer is None:
            raise ValueError("give the callback to the Trainer with callback.attach(trainer)")
        if args.world_size > 1:
            raise ValueError(f"samples are chosen where one process trains the model, got {args.world_size}")
        if args.gradient_accumulation_steps > 1:
            raise ValueError(
                f"gradient_accumulation_steps must be 1 to choose among a step's samples, got {args.gradient_accumulation_steps}:"
                " a larger per_device_train_batch_size has more candidates"
            )
        if self._trainer.accelerator.scaler is not None:
            raise ValueError("fp16 scales the gradients while samples are chosen by them: use bf16")
        self._cache = LayerCache(model, lambda: self.val_loss(model))

    def _choose(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self._cache is not None
        with self._cache:
            loss = self._training_step(*args, **kwargs)
        optimizer = self._trainer.optimizer
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        self.last = select(self._cache, optimizer, self.fraction, redundancy=self.redundancy)
        return loss

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs is None or self.last is None:
            return
        left_out = self.last.weights == 0
        found = {
            "selection/chosen": 1 - float(left_out.double().mean()),
            "selection/score_sum": float(self.last.scores.sum()),
            "selection/score_left_out": float(self.last.scores[left_out].sum()),
        }
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)  # the Trainer's own record was written already

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._cache = None
