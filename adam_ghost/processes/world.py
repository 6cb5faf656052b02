"""The processes that train one model, as the rest of the package sees them: of one process, everything is the identity.

Every exchange begins with a word per process, which says whether that process is well, and where in the program it is. A process
that raises takes part in it, too, instead of what it was to do next; so the others learn of it where they would have waited for
it, and raise as well. Processes that are not at the same place all raise.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")
# bytes of tensors that are reduced at once
_BUCKET = 32 << 20


class World:
    """One process, which has the whole batch."""

    rank, size = 0, 1
    share = 1.0  # of a local gradient in the one that the optimizer uses
    apart = False  # whether a process failed: the others may have taken other steps than it

    def follow(self, model: nn.Module) -> list[Any]:
        """Watches the model's forward passes; returns the hooks' handles."""
        return []

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Forward and backward passes inside the block are no part of the training: no gradients are exchanged for them."""
        yield

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass of the model in which it may exchange parameters: an error inside cannot be told to the others."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """All processes leave the block, or all of them raise."""
        yield

    def meet(self, place: str) -> None:
        """Raises PeerFailed in all processes where not all are at this place of the program."""

    def entrance(self, model: nn.Module) -> nn.Module:
        """What the loop calls to run the model."""
        return model

    def check_reduced(self) -> None:
        """Raises ValueError if the gradients that the optimizer is about to use are this process's own."""

    # what is done with parameters of which each process has a part

    sharded = False
    rounds = False  # whether passes see the weights in half precision, whatever the optimizer has

    def parts(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """This process's parts of parameters or their gradients, in the same memory."""
        return list(tensors)

    def settle(self) -> None:
        """Drops whole parameters, after the parts have changed or before they do."""

    def sum_parts(self, x: Tensor) -> Tensor:
        """The sum over the whole parameters, of which ``x`` is that over this process's parts."""
        return x

    def part(self, name: str, x: Tensor) -> Tensor:
        """This process's part of ``x``, which has the shape of the named parameter."""
        return x

    def whole(self, P: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
        """The whole directions of which ``P`` has this process's parts, a few at a time."""
        yield P

    def carry(self, P: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """The whole directions, each while a backward pass has the weights of it; of ``P``, until the next call."""
        return P or {}

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all processes' ``x``."""
        return x

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """Puts the mean over all processes in each tensor's place."""

    def union(self, names: set[str], known: Sequence[str]) -> set[str]:
        """Those of the ``known`` names that any process has among its ``names``."""
        return names

    def everywhere(self, x: bool) -> bool:
        """Whether ``x`` holds in every process."""
        return not self.union(set() if x else {"not"}, ["not"])

    def first(self, x: T) -> T:
        """Process 0's plain value."""
        return x

    def gather(self, x: T) -> list[T]:
        """Every process's plain value, by rank."""
        return [x]


class Processes(World):
    """Several processes, each with a part of the batch; ``group``: they exchange tensors on the model's device by it.

    All of them have to build it at the same point of the program.
    """

    def __init__(self, group: Any = None):
        self.group = distributed.group.WORLD if group is None else group
        self.rank, self.size = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        self.share = 1 / self.size
        ranks = distributed.get_process_group_ranks(self.group)
        # what the host has to know must not wait for the device
        on_host = "gloo" in distributed.get_backend(self.group)
        self._host = self.group if on_host else distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._source = ranks[0]
        self._told: Exception | None = None  # that the others know of

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Around a pass of the model in which it may exchange parameters: an error inside cannot be told to the others."""
        yield

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except PeerFailed:
            raise
        except Exception as error:
            if error is not self._told:
                self._told, self.apart = error, True
                self._agree("an error", error)
            raise
        self._agree("the end of a step")

    def meet(self, place: str) -> None:
        self._agree(place)

    def _agree(self, place: str, error: Exception | None = None) -> None:
        """Raises PeerFailed where another process has an ``error``, or is at another ``place``."""
        code = zlib.crc32(place.encode()) >> 1
        word = torch.tensor([int(error is not None), code, -code], dtype=torch.int32)
        distributed.all_reduce(word, distributed.ReduceOp.MAX, group=self._host)
        ill, last, first = word.tolist()
        self.apart = self.apart or bool(ill) or last != -first
        if ill:
            said = self._gather(None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                rank, text = next((rank, text) for rank, text in enumerate(said) if text is not None)
                raise PeerFailed(f"process {rank} raised {text}")
        elif last != -first:
            places = ", ".join(f"process {rank} is at {where}" for rank, where in enumerate(self._gather(place)))
            raise PeerFailed(f"the processes do not do the same: {places}; all of them have to announce and take the same steps")

    def _gather(self, x: T) -> list[T]:
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, x, group=self._host)
        return found

    def sum(self, x: Tensor) -> Tensor:
        self._agree("a sum")
        total = x.detach().clone()
        distributed.all_reduce(total, group=self.group)
        return total

    def mean(self, tensors: Sequence[Tensor]) -> None:
        self._agree("a mean")
        for bucket in _buckets(tensors):
            flat = torch.cat([x.detach().flatten() for x in bucket])
            distributed.all_reduce(flat, group=self.group)
            flat /= self.size
            for x, found in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
                x.detach().copy_(found.view_as(x))

    def union(self, names: set[str], known: Sequence[str]) -> set[str]:
        self._agree("a union")
        there = torch.tensor([name in names for name in known], dtype=torch.uint8)
        distributed.all_reduce(there, distributed.ReduceOp.MAX, group=self._host)
        return {name for name, any_has_it in zip(known, there.tolist(), strict=True) if any_has_it}

    def first(self, x: T) -> T:
        self._agree("a broadcast")
        found: list[Any] = [x]
        distributed.broadcast_object_list(found, src=self._source, group=self._host)
        return found[0]

    def gather(self, x: T) -> list[T]:
        self._agree("a gathering")
        return self._gather(x)


class PeerFailed(RuntimeError):
    """Another process raised, or does something else, so this one cannot go on either; the message says what."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, up to a bucket's bytes, in their order."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (x.dtype != bucket[0].dtype or size + x.nbytes > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket
