"""DistributedDataParallel: every process has the whole model and a part of the batch; gradients come averaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adam_ghost.capture.hooks import Hook
from adam_ghost.processes.world import Processes

_AVERAGES = "allreduce_hook"  # the one communication hook that averages gradients as they are


class Replicas(Processes):
    """The replicas of a model. Which wrapper averages its gradients is known from the first forward pass at the latest: frameworks
    wrap a model after they have shown it to their callbacks.
    """

    def __init__(self, wrapper: DistributedDataParallel | None):
        super().__init__(None if wrapper is None else wrapper.process_group)
        self._wrapper = wrapper
        self._reduced: bool | None = None  # whether the last pass's gradients are averaged; None: there was none
        self._silenced: list[tuple[DistributedDataParallel, bool, bool]] | None = None  # in quiet: wrappers, and how they were
        if wrapper is not None:
            refuse_wrapper(wrapper)

    def follow(self, model: nn.Module) -> list[Any]:
        return [model.register_forward_pre_hook(Hook(self._forward_begins), prepend=True)]

    def entrance(self, model: nn.Module) -> nn.Module:
        return model if self._wrapper is None else self._wrapper

    def _forward_begins(self, module: nn.Module, args: tuple) -> None:
        if not torch.is_grad_enabled():
            return
        running = DistributedDataParallel._get_active_ddp_module()
        if self._silenced is not None:
            if running is not None:
                self._silence(running)
            return
        if running is None:
            self._reduced = False
            return
        if running is not self._wrapper:
            refuse_wrapper(running)
            if running.process_group.size() != self.size:
                raise ValueError(
                    f"the model is wrapped for {running.process_group.size()} of {self.size} processes: build the run on the"
                    " DistributedDataParallel itself"
                )
            self._wrapper = running
        refuse_hooks(running)
        self._reduced = running.require_backward_grad_sync

    def check_reduced(self) -> None:
        if not self._reduced:
            why = (
                "the model was not called through its DistributedDataParallel"
                if self._wrapper is None
                else "the step's last forward pass ran under no_sync(), or not through the DistributedDataParallel"
            )
            raise ValueError(f"the gradients are not averaged over the {self.size} processes: {why}")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        if self._silenced is not None:
            yield
            return
        self._silenced = []
        try:
            if self._wrapper is not None:
                self._silence(self._wrapper)
            yield
        finally:
            for wrapper, gradients, buffers in self._silenced:
                wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync = gradients, buffers
            self._silenced = None

    def _silence(self, wrapper: DistributedDataParallel) -> None:
        assert self._silenced is not None
        if all(known is not wrapper for known, _, _ in self._silenced):
            self._silenced.append((wrapper, wrapper.require_backward_grad_sync, wrapper.require_forward_param_sync))
        wrapper.require_backward_grad_sync = False


def refuse_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raises TypeError, by name, where the wrapper does something else than averaging gradients."""
    if getattr(wrapper, "mixed_precision", None) is not None:
        raise TypeError(
            "DistributedDataParallel(mixed_precision=...) is not supported: use torch.autocast, or fully_shard's policy"
        )
    if getattr(wrapper, "_use_python_reducer", False):
        raise TypeError("DistributedDataParallel with the python reducer of torch.compile is not supported: use its default")
    if wrapper._delay_all_reduce_params:
        raise TypeError("DistributedDataParallel(delay_all_reduce_named_params=...) is not supported")
    if wrapper.parameters_to_ignore:
        shown = ", ".join(sorted(wrapper.parameters_to_ignore)[:6])
        raise TypeError(f"DistributedDataParallel leaves gradients as each process has them, which is not supported: {shown}")
    refuse_hooks(wrapper)


def refuse_hooks(wrapper: DistributedDataParallel) -> None:
    """Raises TypeError for hooks that make of the local gradients something else than their mean, and for ``join``."""
    for hook, _ in wrapper._comm_hooks:
        name = getattr(hook, "__name__", type(hook).__name__)
        if name != _AVERAGES:
            raise TypeError(
                f"the communication hook {name!r} of DistributedDataParallel changes gradients on their way (compression,"
                " local steps): no sample's share of that is defined; train without it"
            )
    if wrapper._join_config.enable:
        raise TypeError(
            "DistributedDataParallel.join() is not supported: a process that has no more samples calls run.batch([]) and the model"
            " with an empty batch"
        )
