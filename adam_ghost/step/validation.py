"""The validation gradient at weights of choice, with everything of the user's put back afterwards, to the bit."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.capture import walk
from adam_ghost.capture.surroundings import is_custom, kept, plain_state, random_state, set_random_state, state_of_plain
from adam_ghost.processes.world import World
from adam_ghost.warn import warn

_DATA, _KIND = attrgetter("data"), attrgetter("shape", "dtype", "device")
_PLAIN, _CDATA, _STORAGE = {Tensor, nn.Parameter}, attrgetter("_cdata"), methodcaller("untyped_storage")
_USERS = torch._C._storage_Use_Count
_TRAINING, _BUFFERS = attrgetter("training"), attrgetter("_buffers")


def check_callable(val_loss: Any, *given: Any) -> None:
    """Raises TypeError for what cannot be called with what it will be ``given``."""
    if not callable(val_loss):
        raise TypeError(f"val_loss must be callable and return the validation loss, got {type(val_loss).__name__}")
    try:
        # a decorator may give what the function inside of it takes
        inspect.signature(val_loss, follow_wrapped=False).bind(*given)
    except ValueError:  # of no known signature
        return
    except TypeError as error:
        what = "with the model alone" if given else "without arguments"
        raise TypeError(f"val_loss is called {what}, and this one cannot be: {error}") from None


class Validation:
    """Evaluates ``val_loss`` and its gradient without a trace on the model's modes, buffers and plain attributes, on gradients
    or the training's random numbers.

    Random numbers that ``val_loss`` draws (a new batch each time, dropout) come from streams of its own, of PyTorch, NumPy and
    Python, split off at the first call: it neither advances the training's streams nor draws the same numbers again. A counter
    that is to go on from call to call belongs outside of the model.

    Of several processes each evaluates it, with the same random numbers; or, where it is ``split``, each its own part of it,
    with its own, and the mean over the processes is the loss.
    """

    def __init__(self, val_loss: Callable[[], Tensor] | None, model: nn.Module, world: World | None = None, split: bool = False):
        self.val_loss, self.model, self.tree = val_loss, model, walk.Tree(model)
        self.world, self.split = world or World(), split
        self._stream: dict[str, Any] | None = None
        self._spare: list[Tensor] = []
        self._looked = False  # whether a first gradient was taken, and looked at
        self.running = False  # whether a pass of the model is the validation's
        self._kinds: list[Any] = []  # shapes, types and devices of these
        # a CUDA graph reads the weights where they were when it was captured
        self._fixed = any(getattr(m.__dict__.get("forward"), "__module__", None) == "torch.cuda.graphs" for m in model.modules())
        self._reentrant = False  # whether val_loss runs reentrant checkpoints, which torch.autograd.grad cannot differentiate

    @contextmanager
    def weights_kept(
        self, params: Sequence[Tensor], write: Callable[[list[Tensor]], None] | None = None
    ) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """The weights may be changed inside the block, in place; afterwards they are as before.

        Gives the memory of this process's parts of them, as tensors that no graph knows, and what was in it before. ``write``
        fills this memory when the block begins, while the parameters are still as they were; without it they begin as they were.
        """
        self.world.settle()
        # told before anything here knows their memory, too
        free: Sequence[int] = [] if self._fixed or self.world.sharded else free_among(params)
        held = self.world.parts([*map(_DATA, params)])
        kinds = [*map(_KIND, held)]
        # other memory for the weights, kept from step to step: mapping it afresh would cost more than copying
        if kinds != self._kinds:
            self._kinds, self._spare = kinds, [*map(torch.empty_like, held)]
        spare = self._spare
        places, before = [*spare], [*held]
        stay = [] if len(free) == len(held) else sorted({*range(len(held))} - {*free})
        for i in stay:
            places[i], before[i] = held[i], spare[i]
        _copy(before, held, stay)
        try:
            if write is None:
                _copy(places, before, free)
            else:
                write(places)
            for i in free:
                params[i].data = spare[i]
            yield places, before
        finally:
            for i in free:
                params[i].data = held[i]
            _copy(held, before, stay)
            for i in {*free} - {*free_among(spare)}:  # someone keeps a view of the weights that was made inside
                params[i].data, spare[i] = spare[i].copy_(held[i]), torch.empty_like(held[i])
            self.world.settle()

    @contextmanager
    def undisturbed(self, advance: bool = True) -> Iterator[None]:
        """The model and the training's random numbers are afterwards as before; inside, random numbers are the loss' own."""
        modules, named = self.tree.look()
        modes = [*map(_TRAINING, modules)]
        held = [(m, dict(own)) for m, own in zip(modules, map(_BUFFERS, modules), strict=True) if own]  # which may be replaced
        # running statistics, power iterations
        buffers = [(x.data, x.clone()) for _, own in held for x in own.values() if x is not None]
        devices = sorted({p.device.index for p in named.values() if p.is_cuda})
        outer, self.running = self.running, True
        with torch.random.fork_rng(devices), kept(filter(is_custom, modules)), self.world.quiet():
            if self._stream is None and self.world.size > 1 and not self.split:
                self._stream = self.world.first(_streams(devices))
            if self._stream is not None:
                torch.set_rng_state(self._stream["torch"][0])
                for device, state in zip(devices, self._stream["torch"][1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
                set_random_state(self._stream["others"])
            try:
                yield
                if advance:
                    self._stream = _streams(devices)
            finally:
                self.tree.stir()
                self.running = outer
                for module, mode in zip(modules, modes, strict=True):
                    if module.training is not mode:
                        module.training = mode
                for module, own in held:
                    module._buffers.update(own)
                for x, before in buffers:
                    x.copy_(before)

    def loss(self) -> Tensor:
        """The loss alone, ``[]`` or ``[K]``, detached, with the random numbers that the next ``gradient`` will draw."""
        with self.undisturbed(advance=False), self.world.passing(), torch.no_grad():
            loss = self._checked(self._evaluate()).detach().clone()
        if self.split:
            self.world.mean([loss])
        return loss

    def gradient(self, params: Sequence[Tensor], advance: bool = True) -> tuple[Tensor, list[Tensor]]:
        """The loss ``[]`` or ``[K]``, and its gradient by each of ``params``: ``[*shape]`` or ``[K, *shape]``.

        The next call draws the same random numbers unless this one is to ``advance`` their stream.

        Raises TypeError or ValueError if ``val_loss`` returns anything but a scalar or ``[K]`` with a graph, and (off the
        GPU, where looking costs no synchronisation) if it is not finite.
        """
        self.world.settle()
        # others while the model runs, where they are sharded
        leaves = list(self.model.parameters()) if self._reentrant or self.world.sharded else []
        with self.undisturbed(advance), self.world.passing(), torch.enable_grad():
            loss = self._checked(self._evaluate() if self._looked else self._first(params))
            if not loss.requires_grad:
                raise ValueError("val_loss returned a tensor without a graph: do not detach it or compute it under no_grad")
            losses = loss.reshape(-1)
            if self._reentrant or self.world.sharded:
                rows = _by_backward(losses, params, leaves)
            else:
                try:
                    rows = _by_grad(losses, params)
                except RuntimeError as error:
                    self._reentrant = "use_reentrant" in str(error)
                    if not self._reentrant:
                        raise
                    rows = None
        if rows is None:
            return self.gradient(params, advance)
        if not self._looked:
            self._looked = True
            if all(g is None for row in rows for g in row):
                warn(
                    "val_loss depends on none of the parameters that are trained, all scores are zero: it has to run the very model"
                    " that is trained, not a copy, an average or another one"
                )
        filled = [
            self.world.parts(torch.zeros_like(p) if g is None else g for g, p in zip(row, params, strict=True)) for row in rows
        ]
        grads = filled[0] if loss.ndim == 0 else [torch.stack(column) for column in zip(*filled, strict=True)]
        loss = loss.detach().clone()
        if self.split:
            grads = [g.contiguous() for g in grads]
            # sharded gradients are means already
            self.world.mean([loss] if self.world.sharded else [loss, *grads])
        return loss, grads

    def _evaluate(self) -> Tensor:
        if self.val_loss is None:
            raise ValueError("a validation loss is needed: LayerCache(model, val_loss=...)")
        return self.val_loss()

    def _first(self, params: Sequence[Tensor]) -> Tensor:
        """A first ``val_loss()``: one that calls ``backward()`` would add to the gradients that the model is trained by."""
        with gradients_aside(params):
            loss = self._evaluate()
            if any(p.grad is not None for p in params):
                raise RuntimeError(
                    "val_loss called backward(), which adds to the gradients of the training: it must only return its loss"
                )
        return loss

    @staticmethod
    def _checked(loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(f"val_loss must return a tensor, a scalar or [K], got {type(loss).__name__}")
        if loss.ndim > 1 or loss.numel() == 0:
            raise ValueError(f"val_loss must return a scalar or a non-empty [K], got shape {list(loss.shape)}")
        if loss.device.type == "cpu" and not bool(loss.detach().isfinite().all()):
            raise ValueError(f"val_loss is not finite: {loss.detach().tolist()}")
        return loss

    def state_dict(self) -> dict[str, Any] | None:
        """Where the random streams are, in tensors and plain values."""
        return None if self._stream is None else self._stream | {"others": plain_state(self._stream["others"])}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._stream = None if state is None else state | {"others": state_of_plain(state["others"])}


def _streams(devices: Sequence[int]) -> dict[str, Any]:
    """Where the random streams are now: PyTorch's, of the host and of ``devices``, and the others'."""
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in devices)]
    return {"torch": states, "others": random_state()}


def _by_grad(losses: Tensor, params: Sequence[Tensor]) -> list[Sequence[Tensor | None]]:
    last = len(losses) - 1
    return [torch.autograd.grad(x, params, retain_graph=k < last, allow_unused=True) for k, x in enumerate(losses)]


def _by_backward(losses: Tensor, params: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Sequence[Tensor | None]]:
    rows: list[Sequence[Tensor | None]] = []
    for k, x in enumerate(losses):
        with gradients_aside(leaves):
            x.backward(retain_graph=k < len(losses) - 1)
            rows.append([p.grad for p in params])
    return rows


def free_among(tensors: Sequence[Tensor]) -> Sequence[int]:
    """The places of those whose memory no other tensor knows, so that other memory may take its place for a while."""
    one, users = _users_of_one(), [*map(_USERS, map(_CDATA, map(_STORAGE, tensors)))]
    if users.count(one) == len(users) and {*map(type, tensors)} <= _PLAIN:  # as nearly always
        return range(len(users))
    return [i for i, (n, x) in enumerate(zip(users, tensors, strict=True)) if n == one and type(x) in _PLAIN]


@functools.cache
def _users_of_one() -> int:
    x = torch.empty(1)
    return _USERS(x.untyped_storage()._cdata)


def _copy(into: Sequence[Tensor], out_of: Sequence[Tensor], which: Sequence[int]) -> None:
    """What some of the tensors hold into the others."""
    if which:
        torch._foreach_copy_([into[i] for i in which], [out_of[i] for i in which])


@contextmanager
def gradients_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """The ``.grad`` of all ``leaves`` are None where the block begins, and afterwards as before."""
    held = [(p, p.grad) for p in leaves]
    for p, _ in held:
        p.grad = None
    try:
        yield
    finally:
        for p, g in held:
            p.grad = g
