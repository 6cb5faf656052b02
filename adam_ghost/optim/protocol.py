"""The protocol of an optimizer: the step that it is about to take, as a function of the gradient."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Linearized(NamedTuple):
    """A step linearized along its gradient, for ``K`` targets (one where validation gradients have no leading dimension)."""

    P: list[Tensor]  # per parameter, shaped like its validation gradients: < P , g_i > is sample i's score
    history: Tensor  # [K]: < val_grad , w - w(empty) >, what history alone takes off the loss, to first order
    total: Tensor  # [K]: < P , g >, what the scores of all samples add up to


class Adjoint(NamedTuple):
    """How a number depends on the weights and on an optimizer's state between two steps; one entry per parameter.

    Entries are ``[*shape]``, or ``[K, *shape]`` for ``K`` numbers.
    """

    weights: list[Tensor]
    state: list[list[Tensor]]  # per kind of state that the optimizer keeps


class Kept(NamedTuple):
    """A state apart from its tensors, which may wait elsewhere: ``rebuild(tensors)`` is the state again."""

    tensors: list[Tensor | None]
    rebuild: "Callable[[list[Tensor | None]], OptState]"


@runtime_checkable
class OptState(Protocol):
    """What an optimizer will do to any gradient in the step about to be taken, without doing it.

    Lists have one entry per parameter; a gradient of None counts as zeros. ``w(g)`` are the weights after a step with gradient
    ``g``, ``w(empty) = w(0)`` what history (momentum, weight decay) does alone. Nothing is assumed of the step's form: an
    optimizer may couple the elements of a parameter, and a class may hold several optimizers that share the parameters out.
    """

    linearizations: tuple[str, ...]  # the rules that ``linearize`` knows, the exact one first
    not_carried: str | None  # why no credit can be carried through the step (``schedule="window"``); None: it can
    not_foreseen: str | None  # why its direction cannot be had before the gradient (``schedule="lookahead"``); None: it can

    def __contains__(self, p: Tensor) -> bool:
        """Whether the optimizer trains ``p``."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """Every parameter that the optimizer trains."""
        ...

    def weight_points(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        *,
        empty: list[Tensor] | None = None,
        mid: list[Tensor] | None = None,
    ) -> None:
        """Writes ``w(empty)``, and ``w_mid``, halfway from there to ``w(g)``; either may be the parameters' own memory."""
        ...

    def linearize(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        val_grads: Sequence[Tensor],
        rule: str,
        out: list[Tensor],
    ) -> Linearized:
        """The direction ``P`` by ``rule`` for ``val_grads`` ``[*shape]`` or ``[K, *shape]``, written to ``out`` (may be those)."""
        ...

    def weights(self, p: Tensor, g: Tensor) -> Tensor:
        """``w(g)`` of one parameter, at least float32."""
        ...

    def metric(self, p: Tensor, g: Tensor) -> Tensor:
        """``D`` of one parameter: ``D * g_i`` is, to first order, what a share ``g_i`` of ``g`` adds to the step downhill.

        Raises TypeError where the step has no elementwise form.
        """
        ...

    def expected_gradient(self, p: Tensor) -> Tensor | None:
        """The gradient that history lets expect before the backward pass, in memory of its own; None without history."""
        ...

    def steps_taken(self, default: int) -> int:
        """How many steps the longest history among the parameters holds; ``default`` where only the device knows."""
        ...

    # what credit over several steps takes (docs/method.md, 6)

    def scalars(self, params: Sequence[Tensor]) -> Any:
        """What the step depends on beside tensors of the parameters' size: learning rate, step count and the like."""
        ...

    def kept(self, params: Sequence[Tensor]) -> "Kept":
        """A copy of all that the step depends on; the copies of ``params`` are its parameters, in their order."""
        ...

    def advanced(self, grads: Sequence[Tensor | None], scalars: Any) -> "OptState":
        """The state after the step with ``grads``, in memory of its own, if the step then is to be taken with ``scalars``."""
        ...

    def adjoint(self, val_grads: Sequence[Tensor]) -> Adjoint:
        """The adjoint of a loss with this gradient by the weights, in the gradients' memory: it depends on no other state."""
        ...

    def pull(self, grads: Sequence[Tensor | None], after: Adjoint, shares: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Turns the adjoint after the step with ``grads`` into that before it, in place; returns the gradient's, per parameter.

        ``shares``: per parameter, ``[]``, the usual size of one sample's part of an element's gradient. A step whose derivative
        means nothing at such a distance bounds it there (docs/method.md, 6); without them it is the derivative.
        """
        ...


def number(x: float | Tensor) -> float | Tensor:
    """A float where reading costs no device synchronisation, else a float64 0-D tensor."""
    if not isinstance(x, Tensor):
        return float(x)
    return float(x) if x.device.type == "cpu" else x.detach().to(torch.float64, copy=True).reshape(())


@runtime_checkable
class Foreseeing(Protocol):
    """An ``OptState`` that linearizes at the gradient which history lets expect without making it."""

    def linearize_expected(self, params: Sequence[Tensor], val_grads: Sequence[Tensor], rule: str, out: list[Tensor]) -> Linearized:
        """``linearize`` with each parameter's ``expected_gradient``."""
        ...


class Reader(NamedTuple):
    """How optimizers of a kind are read."""

    kind: type[torch.optim.Optimizer] | str
    read: Callable[[Any], OptState]
    edits_gradients: bool


_READERS: list[Reader] = []


def register(kind: type[torch.optim.Optimizer] | str, read: Callable[[Any], OptState], *, edits_gradients: bool = False) -> None:
    """Has optimizers that step as this class does read by ``read``, which copies nothing.

    Args:
        kind: the class, or ``module.Class``, whichever defines ``step``, of one that need not be there to be imported.
        read: takes the optimizer, about to step, whose parameters' ``.grad`` is what it will step by. An optimizer that averages
            gradients over processes inside ``step`` has none such: it is not to be registered, unless ``read`` puts them there.
        edits_gradients: whether ``step`` itself changes the gradients in place.
    """
    _READERS.insert(0, Reader(kind, read, edits_gradients))


def _reader(optimizer: torch.optim.Optimizer) -> Reader | None:
    # step is wrapped anew in each class by the optimizer's profiling hooks: compare what they wrap
    step = inspect.unwrap(type(optimizer).step)
    name = f"{step.__module__}.{step.__qualname__}"
    for reader in _READERS:
        kind = reader.kind
        if name == f"{kind}.step" if isinstance(kind, str) else step is inspect.unwrap(kind.step):
            return reader
    return None


def edits_gradients(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's ``step`` itself changes the gradients in place."""
    reader = _reader(optimizer)
    return reader is not None and reader.edits_gradients


def read_one(opt_state: Any, name: str = "opt_state") -> OptState:
    """The state of an optimizer about to step; an ``OptState`` is returned as it is.

    Raises TypeError for an optimizer that nobody registered, also for subclasses that step differently.
    """
    if isinstance(opt_state, torch.optim.Optimizer):
        if reader := _reader(opt_state):
            return reader.read(opt_state)
    elif isinstance(opt_state, OptState):
        return opt_state
    known = ", ".join(sorted(_shown(reader.kind) for reader in _READERS))
    raise TypeError(
        f"{name} must be one of {known}, or an optimizer's state, got {type(opt_state).__name__}; adam_ghost.optim.register adds"
        " others"
    )


def _shown(kind: type | str) -> str:
    if isinstance(kind, str):
        return f"{kind.split('.')[0]}'s {kind.rsplit('.', 1)[1]}"
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.") else kind.__name__
