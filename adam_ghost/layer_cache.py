"""The thin layer's recorder: a `with` block around one step's forward and backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adam_ghost.capture.hooks import Hook
from adam_ghost.capture.learned import recorder_of
from adam_ghost.capture.recording import Recording
from adam_ghost.capture.rows import Packing, find_packing
from adam_ghost.optim import Optimizers, OptState, read_optimizer
from adam_ghost.optim.adam import AdamState
from adam_ghost.processes.find import find_world, refuse_unfollowed
from adam_ghost.step.coverage import Coverage, refuse_mixed_samples
from adam_ghost.step.fingerprint import EDITED, Fingerprint, gradients, versions
from adam_ghost.step.step import Step, gather_step
from adam_ghost.step.supported import refuse_unsupported
from adam_ghost.step.validation import Validation, check_callable
from adam_ghost.step.whole_pass import WholePass, may_pass


class LayerCache:
    """Records each layer call's input and output gradient inside ``with cache:``, for ``attribute``, ``gram`` and the like.

    A layer is a module that owns trainable parameters and has no submodules (``nn.MultiheadAttention`` and parametrized
    modules count as one); parameters used by torch functions outside such modules are recorded per function. Entered again, it
    forgets what it held. Nothing of it stays on the model after the block, and outputs, gradients and random state are those of
    the bare model.

    Args:
        model: the module whose forward pass runs inside the block, called with the batch along dimension 0: every tensor among
            its arguments whose first dimension is as long as the first one's is taken for samples, a table of that many rows
            too: make such a table a buffer of the model.
        val_loss: called without arguments whenever the validation gradient is needed; returns the loss to attribute, a
            scalar or ``[K]`` for ``K`` targets, with a graph. It runs the model itself, in any mode it likes.
        val_split: of several processes, each evaluates its own part of the validation loss, whose mean is meant; otherwise all
            evaluate the same.
        strict: raise instead of warning where a parameter's gradient cannot be attributed.
        fallback: score parameters that the layer calls lose by the derivative of the whole model along ``P``, one forward-mode
            pass of about two forward passes' cost, and say so once: a sample's share is then what comes through its rows of the
            model's output. False: leave them out, and name them. None: where it can, which is not where
            ``fully_shard`` keeps weights in parts.

    Raises:
        TypeError: the model is spread over processes or devices in a way that is not followed, or has complex parameters.
        ValueError: on entering, if a BatchNorm is in training mode (it mixes the samples), or if a block is nested; inside, if
            the batch is not dimension 0.
    """

    def __init__(
        self,
        model: nn.Module,
        val_loss: Callable[[], Tensor] | None = None,
        *,
        val_split: bool = False,
        strict: bool = False,
        fallback: bool | None = None,
    ):
        refuse_unfollowed(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if val_loss is not None:
            check_callable(val_loss)
        refuse_unsupported(model)
        self.model, world = find_world(model)
        self.coverage, self.fallback = Coverage(strict), may_pass(fallback, world)
        self.validation = Validation(val_loss, self.model, world, val_split)
        self._recorder = recorder_of(self.model, world.size == 1, self.validation.tree)
        self._recording = False
        self._handles: list[RemovableHandle] = []
        self._packing: Packing | None = None  # of the next block
        self.loses = True  # whether layer calls lose parameters, as far as a step has told
        self.clear()

    def packed(self, offsets: Tensor | None = None, *, samples: Tensor | None = None) -> "LayerCache":
        """``with cache.packed(offsets):`` records one block whose samples are packed in rows of tokens.

        Scores are the samples' then, ``[n]``; per token they are the rows' still.

        Args:
            offsets: ``[n + 1]`` integers: sample ``i`` is the tokens ``offsets[i]:offsets[i + 1]`` of all rows in a line
                (``cu_seqlens``). That the model keeps them apart, by a mask or by segments, is taken for granted.
            samples: instead, the sample of each token of all rows, -1 where it is padding; samples count from 0.

        Raises ValueError where both are given, or one of another shape or type.
        """
        if offsets is None and samples is None:
            raise ValueError("packed needs offsets or samples")
        self._packing = find_packing(offsets, samples, next(self.model.parameters()).device)
        return self

    def clear(self) -> None:
        """Forgets what was recorded."""
        self.recorded = Recording()
        self.passes: list[WholePass] = []
        self._fingerprint: Fingerprint | None = None
        self._weights: list[nn.Parameter] = []  # that the recorded gradients belong to
        self._versions: list[int] = []

    def __enter__(self) -> "LayerCache":
        if self._recording:
            raise ValueError("this LayerCache is recording already: `with cache` cannot be nested")
        with self.validation.tree.steady() as modules:
            refuse_mixed_samples(modules)
            self._begin()
        return self

    def _begin(self) -> None:
        self.clear()
        self.recorded, self._packing = Recording(self._packing), None
        self._handles = self.validation.world.follow(self.model)
        if self.fallback and self.loses:
            self._handles += [
                self.model.register_forward_pre_hook(Hook(self._pass_begins), with_kwargs=True),
                self.model.register_forward_hook(Hook(self._pass_ends)),
            ]
        self._recorder.attach()
        self._recorder.begin(self.recorded)
        self._recording = True

    def __exit__(self, *exc: object) -> None:
        self._recorder.detach()
        self._recorder.recording = None
        self._recording = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if exc[0] is not None:
            self.clear()
            return
        with self.validation.tree.steady():
            if grads := self._grads():
                self._fingerprint = Fingerprint.of(grads)
            self.mark_weights()

    def _pass_begins(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            self.passes.append(WholePass(module, args, kwargs))

    def _pass_ends(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.is_grad_enabled():
            self.passes[-1].ended(output)

    def mark_weights(self) -> None:
        """The weights are those that the recorded gradients belong to."""
        self._weights = [*self.validation.tree.named_parameters().values()]
        self._versions = versions(self._weights)

    def same_weights(self) -> bool:
        return versions(self._weights) == self._versions

    def _grads(self) -> dict[str, Tensor]:
        grads = gradients(self.validation.tree.named_parameters())
        dense = {name: g for name, g in grads.items() if g.layout is torch.strided}
        return dict(zip(dense, self.validation.world.parts(dense.values()), strict=True))

    def scaled_since(self) -> dict[str, Tensor]:
        """What the gradients were multiplied by since the block ended (clipped, unscaled); empty if by nothing.

        Raises ValueError if they were changed in any other way.
        """
        grads = self._grads()
        if self._fingerprint is None:
            return {}
        changes = self._fingerprint.changes(grads, self.validation.world)
        if changes.edited.device.type != "cpu":  # looking would wait for it: scores come out as not finite
            return changes.factors()
        if void := [name for name, gone in zip(changes.names, changes.void.tolist(), strict=True) if gone]:
            raise ValueError(f"the gradient of '{void[0]}' is not finite")
        if bool(changes.edited.any()):
            raise ValueError(EDITED)
        return changes.factors()

    @property
    def recording(self) -> bool:
        return self._recording


def check_cache(cache: object) -> None:
    """Raises TypeError where ``cache`` is something else than a LayerCache."""
    if not isinstance(cache, LayerCache):
        raise TypeError(f"layer_cache must be an adam_ghost.LayerCache, got {type(cache).__name__}")


def open_step(cache: LayerCache, opt_state: Optimizers | OptState) -> Step:
    """The step that ``cache`` recorded, checked before anything is computed or changed. Errors as in ``attribute``."""
    check_cache(cache)
    opt_state = read_optimizer(opt_state)
    if cache.recording:
        raise ValueError("the scores are computed after the `with cache` block, not inside it")
    if cache.recorded.deviation:
        raise ValueError(cache.recorded.deviation)
    if not cache.recorded.calls:
        raise ValueError("nothing was recorded: run the model's forward and backward pass inside `with cache`")
    if not cache.same_weights():
        raise ValueError("the weights changed since `with cache`: compute the scores before optimizer.step()")
    world = cache.validation.world
    if world.sharded and type(opt_state) is not AdamState:
        raise ValueError("where fully_shard shards the model, one Adam or AdamW of torch.optim must train it")
    world.settle()
    named = cache.validation.tree.named_parameters()
    world.check_reduced()
    step = gather_step(named, opt_state, [cache.recorded], cache.coverage, cache.passes, world)
    cache.loses = bool(step.whole or step.missing)
    step.scale = cache.scaled_since()
    return step
