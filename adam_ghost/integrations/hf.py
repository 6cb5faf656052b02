"""Hugging Face's ``Trainer``: one callback.

trainer = Trainer(model, args, train_dataset=dataset, ...)
AttributionCallback(val_loss, ledger="runs/today").attach(trainer)
trainer.train()
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, default_data_collator

from adam_ghost.capture.hooks import Hook
from adam_ghost.inrun import InRun
from adam_ghost.integrations.collated import lay_out
from adam_ghost.integrations.ids import ID, logged
from adam_ghost.integrations.indices import Numbered, lacks_ids
from adam_ghost.integrations.packed import pack_ids
from adam_ghost.step.validation import check_callable

_STATE = "adam_ghost.pt"
_COUNTED = ("_metrics", "_total_train_tokens")  # in which TRL's trainers count what their compute_loss sees


class AttributionCallback(TrainerCallback):
    """Attributes a ``Trainer``'s steps: accumulation, clipping, mixed precision, checkpoints and resuming included.

    The ids reach the run through the collator; the model never sees them. ``attribution/score_sum``, ``/total``, ``/val_loss``,
    ``/gap`` (how far the scores miss ``/total``) and ``/coverage`` go where the Trainer reports to, and the run's state into
    every checkpoint.

    TRL's trainers need nothing more, ``padding_free`` and the pairs of DPO and reward models included: a pair's score is that of
    its chosen and its rejected answer. ``packing=True`` drops the ids when the trainer is made: give ``attach`` the data set as
    the trainer was given it. Packed by ``bfd``, samples do not see each other, and each score is its sample's; where rows are
    ``wrapped``, a sample's tokens are what later ones of the row see before them, and what they do there counts as theirs.
    A sample that was cut counts as often in a step as it has pieces.

    ``schedule="window"`` needs nothing more: batches are run again by the Trainer's own ``compute_loss``, of the same inputs and
    ``num_items_in_batch``, with its logging silenced. These inputs are kept until their window is swept.

    Args:
        val_loss: called with the model; returns the validation loss, ``[]`` or ``[K]``, with a graph.
        column: of the data set, with the ids: integers, or strings. None: ``sample_id``, or places in the data set where it has no
            such column.
        options: of ``InRun``: ``schedule``, ``ledger``, ``every`` and so on, but ``train_loss``, which is the Trainer's.

    Raises:
        ValueError: where training begins, with ``schedule="window"`` and a Trainer that ``attach`` was not told of.
    """

    def __init__(self, val_loss: Callable[[nn.Module], Tensor], *, column: str | None = None, **options: Any):
        check_callable(val_loss, None)
        self.val_loss, self.column, self.options = val_loss, column or ID, options
        self._may_number = column is None
        self.run: InRun | None = None
        self._forward: Any = None
        self._inside = False  # a validation pass, or a batch that is run again
        self._windows = options.get("schedule") == "window"
        self._trainer: Any = None
        self._compute_loss: Any = None  # the Trainer's own
        self._computing: nn.Module | None = None  # the model as the Trainer calls it
        self._named: dict[str, Any] | None = None  # whose batch compute_loss was given, from there to the forward pass
        self._inputs: tuple[dict, tuple, dict] | None = None  # what compute_loss was given, from there to the forward pass

    def attach(self, trainer: Any, dataset: Any = None) -> "AttributionCallback":
        """Adds itself to ``trainer``, before what reports its logs, and lets the ids through its loader.

        Args:
            trainer: a ``Trainer``, TRL's among them.
            dataset: with TRL's ``packing=True``, what the trainer was given as ``train_dataset``: it is packed once more, with ids.

        Raises:
            ValueError: ``dataset`` is another one.
        """
        if dataset is not None:
            trainer.train_dataset = pack_ids(trainer, dataset, self.column)
        elif self._may_number and lacks_ids(trainer.train_dataset, self.column):
            trainer.train_dataset = Numbered(trainer.train_dataset, self.column)
        self._trainer, self._compute_loss = trainer, trainer.compute_loss
        trainer.compute_loss = self._follow_loss
        # what takes columns off that the model does not know would take off the ids: it works behind us
        collate = trainer._get_collator_with_removed_columns(trainer.data_collator, description="training")
        trainer.data_collator = self.collator(collate)
        trainer.args.remove_unused_columns = False
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def collator(self, collate: Callable[[list[dict]], dict] | None = None) -> Callable[[list[dict]], dict]:
        """A collator that takes the ids off the samples and sends them beside the batch."""
        collate = collate or default_data_collator

        def with_ids(samples: list[dict]) -> dict:
            ids = [sample[self.column] for sample in samples if self.column in sample]
            bare = [{k: v for k, v in s.items() if k != self.column} for s in samples]
            batch = dict(collate(bare))
            # a data set for evaluation needs no ids
            return batch | ({self.column: lay_out(ids, bare, batch)} if len(ids) == len(samples) else {})

        return with_ids

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
        if self._windows and self._trainer is None:
            raise ValueError(
                "schedule='window' runs batches again by the Trainer's compute_loss: give the callback to the Trainer with"
                " callback.attach(trainer)"
            )
        val_loss = lambda: self._val_loss(model)  # noqa: E731
        self.run = InRun(model, optimizer, val_loss, train_loss=self._train_loss, **self.options)
        saved = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", _STATE)
        if state.global_step and os.path.exists(saved):
            self.run.load_state_dict(torch.load(saved, weights_only=True))
        elif state.global_step:
            self.run.close()
            raise FileNotFoundError(f"the run resumes at step {state.global_step}, but there is no {saved}")
        # before the run's own hook, which then finds the batch named
        self._forward = model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True, prepend=True)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        training = self._in_training(model)
        kwargs = dict(kwargs)
        named = kwargs.pop(self.column, None)
        if not training:
            return args, kwargs
        if named is None:  # the Trainer's compute_loss had them
            named, self._named = self._named, None
        if named is None:
            raise KeyError(
                f"the batch has no {self.column!r}: give the data set that column, and the callback to the Trainer with"
                " callback.attach(trainer). If the data set has it, something on the way drops it: TRL's packing=True does"
                " (callback.attach(trainer, dataset) brings it back)"
            )
        if self.run is not None:
            inputs, self._inputs = self._inputs, None
            if self._windows and inputs is None:
                raise ValueError(
                    "schedule='window' runs batches again by the Trainer's compute_loss, which this Trainer did not call before the"
                    " model: use another schedule, or InRun in a loop of your own"
                )
            offsets = None if named["offsets"] is None else torch.tensor(named["offsets"])
            self.run.batch(named["ids"], offsets, views=named["views"], inputs=inputs)
        return args, kwargs

    def _in_training(self, model: nn.Module) -> bool:
        return model.training and torch.is_grad_enabled() and not self._inside

    def _follow_loss(self, model: nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's ``compute_loss``, whose arguments are kept on the way, without the ids: it may call other models."""
        bare = {k: x for k, x in inputs.items() if k != self.column}
        if self._in_training(model):
            self._named = inputs.get(self.column)
            if self._windows:
                self._computing, self._inputs = model, (dict(bare), args, kwargs)
        return self._compute_loss(model, bare, *args, **kwargs)

    def _train_loss(self, given: tuple[dict, tuple, dict]) -> Tensor:
        """A batch's loss once more, by what the Trainer computed it from."""
        inputs, args, kwargs = given
        with self._entered(), _unlogged(self._trainer):
            # a copy: the Trainer takes the labels out
            return self._compute_loss(self._computing, dict(inputs), *args, **kwargs)

    def _val_loss(self, model: nn.Module) -> Tensor:
        with self._entered():
            return self.val_loss(model)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The model's calls inside the block are not the training's."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self.run.epoch = int(state.epoch or 0)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        steps = self.run and self.run.steps
        if logs is not None and steps and not steps[-1].skipped:
            found = logged(steps[-1])
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)  # the Trainer's own record was written already

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is None:
            return
        found = self.run.state_dict()  # by all processes, of all
        if state.is_world_process_zero:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            torch.save(found, os.path.join(folder, _STATE))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self._forward.remove()
            self.run.close()


@contextmanager
def _unlogged(trainer: Any) -> Iterator[None]:
    """What the Trainer's ``compute_loss`` logs and counts inside the block is forgotten."""
    held = {name: copy.deepcopy(x) for name, x in vars(trainer).items() if name in _COUNTED}
    log = {name: x for name, x in vars(trainer).items() if name == "log"}  # the class has one, too
    trainer.log = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del trainer.log
        vars(trainer).update(held | log)
