"""``fully_shard`` (FSDP2): every process has a part of each parameter, of its gradient and of the optimizer's state.

What is elementwise is done on the parts as they lie. Layers are contracted with whole directions, which are gathered unit by unit
and dropped again; a unit is what one ``fully_shard`` wraps.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import RegisterPostBackwardFunction
from torch.distributed.tensor import DTensor, Shard

from adam_ghost.capture.declared import FOLLOWED, PASSING
from adam_ghost.processes.carried import Carried
from adam_ghost.processes.world import Processes

# what gathers equal parts is called in this release of PyTorch
GATHER = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"

FOLLOWED.add(RegisterPostBackwardFunction)
PASSING.add(RegisterPostBackwardFunction)


class Shards(Processes):
    """The shards of a model."""

    sharded = True

    def __init__(self, model: nn.Module):
        settle(model)
        self._whole = {name: p for name, p in model.named_parameters() if p.requires_grad}
        refuse_layout(model, self._whole)
        first = next(iter(self._whole.values()))
        assert isinstance(first, DTensor)
        super().__init__(first.device_mesh.get_group())
        self._modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.units = _units(model, self._whole)
        seen_as = [group.mp_policy.param_dtype for group, _ in self.units]
        self.rounds = any(dtype is not None and dtype.itemsize <= 2 for dtype in seen_as)
        self._carried: Carried | None = None
        self._broken = False  # whether a pass broke off, in which the others wait for this process

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Gradients are means over the processes inside, too, whether the loop accumulates or not."""
        groups = [group for module in self._modules for group in _groups(module)]
        if any(p.unsharded_accumulated_grad is not None for group in groups for p in group.fsdp_params):
            raise ValueError(
                "a backward pass under set_requires_gradient_sync(False) has left gradients that no pass has averaged: announce it"
                " by run.batch, or end it with one that averages"
            )
        before = [(group, group.reduce_grads, group.gradient_divide_factor) for group in groups]
        for group in groups:
            group.reduce_grads, group.gradient_divide_factor = True, None
        try:
            yield
        finally:
            for group, reduce_grads, factor in before:
                group.reduce_grads, group.gradient_divide_factor = reduce_grads, factor

    @contextmanager
    def passing(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._broken = True
            raise

    def _agree(self, place: str, error: Exception | None = None) -> None:
        # the others wait for parameters in a pass: they learn of the error when this process ends
        if not self._broken:
            super()._agree(place, error)

    def check_reduced(self) -> None:
        factors = {group.gradient_divide_factor or self.size for module in self._modules for group in _groups(module)}
        if len(factors) > 1:
            raise ValueError(f"set_gradient_divide_factor() must be the same for the whole model, got {sorted(factors)}")
        self.share = 1 / factors.pop()
        for module in self._modules:
            for group in _groups(module):
                if not group.reduce_grads:
                    raise ValueError(
                        f"the gradients are not averaged over the {self.size} processes: set_requires_gradient_sync(True) before"
                        " the last backward pass of a step"
                    )

    def parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]

    def settle(self) -> None:
        for module in self._modules:
            module.reshard()

    def part(self, name: str, x: Tensor) -> Tensor:
        dim = _sharded_dim(self._whole[name])
        lengths = [self._shape(name, rank)[dim] for rank in range(self.size)]
        return x.narrow(dim, sum(lengths[: self.rank]), lengths[self.rank])

    def sum_parts(self, x: Tensor) -> Tensor:
        return self.sum(x)

    def whole(self, P: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """The directions ``[K, *shape]`` of one unit after another, which is unsharded meanwhile; the next ones on their way."""
        units = [(group, [name for name in names if name in P]) for group, names in self.units]
        units = [(group, names) for group, names in units if names]
        coming = self._send(P, units[0][1])
        for i, (group, names) in enumerate(units):
            gathered, work = coming
            work.wait()
            if i + 1 < len(units):
                coming = self._send(P, units[i + 1][1])
            group.unshard()
            group.wait_for_unshard()
            try:
                yield self._join(P, names, gathered)
            finally:
                group.reshard()

    def carry(self, P: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        carried, self._carried = self._carried, None
        if carried is not None:
            carried.end()
        if P is None:
            return {}
        self._carried = Carried(P, self.units, self._gather_parts, self._join)
        return self._carried

    def _send(self, P: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Any]:
        self._agree("a unit's directions")
        return self._gather_parts(P, names)

    def _gather_parts(self, P: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Any]:
        """``[processes, elements]``: each one's parts, in a line and filled up to the longest."""
        longest = max(sum(self._size(P[name], name, rank) for name in names) for rank in range(self.size))
        parts = torch.cat([P[name].flatten() for name in names])
        sent = parts.new_zeros(longest)
        sent[: len(parts)] = parts
        gathered = parts.new_empty(self.size * longest)
        work = getattr(distributed, GATHER)(gathered, sent, group=self.group, async_op=True)
        return gathered.view(self.size, longest), work

    def _shape(self, name: str, rank: int) -> list[int]:
        """Of a process's part of a parameter: chunks along one dimension, the last ones smaller or empty."""
        p = self._whole[name]
        shape, dim = list(p.shape), _sharded_dim(p)
        chunk = -(-shape[dim] // self.size)
        shape[dim] = max(0, min(chunk, shape[dim] - rank * chunk))
        return shape

    def _size(self, x: Tensor, name: str, rank: int) -> int:
        return len(x) * torch.Size(self._shape(name, rank)).numel()

    def _join(self, P: Mapping[str, Tensor], names: Sequence[str], gathered: Tensor) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {name: [] for name in names}
        for rank, line in enumerate(gathered):
            at = 0
            for name in names:
                size = self._size(P[name], name, rank)
                parts[name].append(line[at : at + size].view(len(P[name]), *self._shape(name, rank)))
                at += size
        return {name: torch.cat(found, dim=1 + _sharded_dim(self._whole[name])) for name, found in parts.items()}


def is_sharded_whole(model: nn.Module) -> bool:
    """Whether any part of the model is ``fully_shard``'s."""
    return any(isinstance(m, FSDPModule) for m in model.modules())


def settle(model: nn.Module) -> None:
    """Drops the whole parameters that a forward pass has left behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_layout(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Raises TypeError, by name, for parameters that are spread in another way than in parts along one dimension."""
    if not isinstance(model, FSDPModule):
        raise TypeError("parts of model are fully_shard's, the model itself is not: call fully_shard(model) last, on the whole")
    for name, p in params.items():
        if not isinstance(p, DTensor):
            raise TypeError(f"'{name}' is whole in every process (ignored_params), which is not supported: shard or freeze it")
        if p.device_mesh.ndim != 1 or not isinstance(p.placements[0], Shard):
            raise TypeError(
                f"'{name}' lies on a mesh of {p.device_mesh.ndim} dimensions as {p.placements} (hybrid sharding, tensor parallel),"
                " which is not supported: use fully_shard over one dimension"
            )
    for module in model.modules():
        for group in _groups(module) if isinstance(module, FSDPModule) else ():
            policy = type(group.offload_policy).__name__
            if policy != "OffloadPolicy":
                raise TypeError(f"fully_shard with {policy} is not supported: keep shards on the device")


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    found = [state._fsdp_param_group] if several is None else several
    return [group for group in found if group is not None]


def _sharded_dim(p: Tensor) -> int:
    assert isinstance(p, DTensor)
    placement = p.placements[0]
    assert isinstance(placement, Shard)
    return placement.dim


def _units(model: nn.Module, params: Mapping[str, Tensor]) -> list[tuple[Any, list[str]]]:
    """What one call of ``fully_shard`` gathers at once, each with its parameters' names."""
    names: dict[Tensor, str] = {p: name for name, p in params.items()}
    found: dict[Any, list[str]] = {}
    for module in model.modules():
        for group in _groups(module) if isinstance(module, FSDPModule) else ():
            held = [p.sharded_param for p in group.fsdp_params]
            found[group] = [names[p] for p in held if p in names]  # several modules may share one
    return list(found.items())
