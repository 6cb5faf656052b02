"""Forms: how the scores of one kind of layer are evaluated. A kind is a file, and registers itself here."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from adam_ghost.capture.calls import Call
from adam_ghost.capture.kinds import register_kind
from adam_ghost.capture.rows import Packing

Directions = Mapping[str, Tensor]  # parameter's name -> P [K, *shape]


class Asked(NamedTuple):
    """What is asked of a call."""

    n: int  # rows of the batch
    packing: Packing | None = None  # which tokens are whose, if rows are not samples
    per_token: bool = False
    half: bool = False  # whether the operands of large products may be rounded to bfloat16

    @property
    def samples(self) -> int:
        return self.n if self.packing is None else self.packing.samples


class Form(NamedTuple):
    """How calls of one kind are evaluated.

    ``scores(call, P, asked)``: the call's share of every ``< P , g_i >``, ``[n, K]``, or ``[n, T, K]`` per token, in P's dtype.
    ``sample_gradients(call, name, asked, block)``: the samples' gradients of parameter ``name`` through the call, ``[n, *block]``,
    for a block of its first dimension; None: one backward pass per sample.
    """

    scores: Callable[[Call, Directions, Asked], Tensor]
    sample_gradients: Callable[[Call, str, Asked, slice], Tensor] | None = None


_FORMS: dict[str, Form] = {}


def register(kind: str, form: Form, matches: Callable[[nn.Module], bool] | None = None) -> None:
    """Has calls of ``kind`` evaluated by ``form``; ``matches`` tells the modules of a kind that is new."""
    _FORMS[kind] = form
    if matches is not None:
        register_kind(kind, matches)


def form_of(call: Call) -> Form | None:
    """The form for a call; None: none is registered, and its Jacobian serves."""
    return None if call.kind is None else _FORMS.get(call.kind)
