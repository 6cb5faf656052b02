"""Products with parameters by torch functions: which are linear in them, the scores of rows times a weight, and a forward mode."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adam_ghost.capture.calls import Call, Ref
from adam_ghost.capture.kinds import is_plain_lookup
from adam_ghost.capture.names import counterpart, functions
from adam_ghost.capture.rows import Rows
from adam_ghost.scores import linear, ops
from adam_ghost.scores.forms import Asked, Directions
from adam_ghost.scores.shapes import add, collect_rows, lead_rows

# products of experts: rows sorted by expert, ``offs`` where each one's end
GROUPED = frozenset((*functions("F.grouped_mm"), *functions("torch._grouped_mm")))
_ADDS_BY_NAME = "add __add__ __radd__"
_DIFFERENCES_BY_NAME = "sub __sub__ __rsub__"
_PRODUCTS_BY_NAME = "matmul __matmul__ __rmatmul__ mm bmm mv torch.einsum torch.tensordot"
# that put elements in other places, or hold them in another way
_LINEAR_BY_NAME = """
    transpose t permute swapaxes swapdims adjoint movedim moveaxis view reshape flatten unflatten squeeze unsqueeze expand expand_as
    chunk split unbind select narrow index_select __getitem__ contiguous clone to type_as float double half bfloat16
"""
# linear in each of their operands
_PRODUCTS = GROUPED | frozenset(f for name in _PRODUCTS_BY_NAME.split() for f in functions(name))
# rows times a matrix
_MATMULS = frozenset(f for name in ("matmul", "__matmul__", "mm") for f in functions(name))
_ADDS = frozenset(f for name in _ADDS_BY_NAME.split() for f in functions(name))
_SUMS = _ADDS | frozenset(f for name in _DIFFERENCES_BY_NAME.split() for f in functions(name))
_TRANSPOSES = frozenset(getattr(Tensor, name).__get__ for name in ("T", "mT"))
_LINEAR = _TRANSPOSES | frozenset(f for name in _LINEAR_BY_NAME.split() for f in functions(name))


def is_linear(call: Call) -> bool:
    """Whether the outputs of ``call`` are linear in its parameters: then it is its own derivative, run with P in their place."""
    if call.kind in ("affine", "norm"):
        # an argument made of parameters makes it a product of two
        return set(call.parameters()) == {call.name_of(p) for p in call.own.values()}
    if isinstance(call.fn, nn.Module) or call.inplace:
        return False
    made = [x for x in call.arguments() if isinstance(x, (nn.Parameter, Ref))]
    if call.fn is F.linear:
        input, *others = call.arguments()
        weight_and_bias = [x for x in others if isinstance(x, (Tensor, Ref))]
        apart = not isinstance(input, (nn.Parameter, Ref)) and len(weight_and_bias) == len(made)
        return apart and all(_is_linear_source(x) for x in made)
    return counterpart(call.fn) in _PRODUCTS and len(made) == 1 and _is_linear_source(made[0])


def is_sum(call: Call) -> bool:
    """Whether ``call`` adds what is linear in its parameters to something else."""
    if isinstance(call.fn, nn.Module) or call.inplace or counterpart(call.fn) not in _SUMS:
        return False
    made = [x for x in call.arguments() if isinstance(x, (nn.Parameter, Ref))]
    return len(made) == 1 and _is_linear_source(made[0])


def _is_linear_source(x: nn.Parameter | Ref) -> bool:
    """Whether what an argument was made of parameters by is linear in them."""
    if not isinstance(x, Ref):
        return True
    made = [y for y in x.call.arguments() if isinstance(y, (nn.Parameter, Ref))]
    if isinstance(x.call.fn, nn.Module):
        return not made and is_plain_lookup(x.call.fn)
    return x.call.fn in _LINEAR and len(made) == 1 and not x.call.inplace and _is_linear_source(made[0])


def scores_of_rows(call: Call, P: Directions, asked: Asked) -> Tensor | None:
    """The scores of rows times a weight, the product never in memory as a whole; None where ``call`` is another one."""
    if (call.fn is not F.linear and counterpart(call.fn) not in _MATMULS | GROUPED) or not is_linear(call):
        return None
    rows, *others = call.arguments()
    made = [x for x in others if isinstance(x, (nn.Parameter, Ref))]
    if isinstance(rows, (nn.Parameter, Ref)) or not isinstance(rows, Tensor) or rows.ndim < 2:
        return None
    directions = [x for x in (_direction(call, x, P) for x in made) if x is not None]
    weight, bias = (next((x for x in directions if x.ndim == ndim), None) for ndim in (3, 2))  # [K, *, *], [K, d_out]
    b, tag = call.grad_output[0], call.outputs[0]
    if b.ndim != rows.ndim or (isinstance(tag, Rows) and tag.of.shape[-1] != 1):
        return None  # a vector's product, or rows that are not told apart by their first dimensions
    if bias is not None and bias.shape[1] != b.shape[-1]:
        return None  # one number for all outputs
    if call.fn is F.linear:
        return linear.product_scores(rows, b, tag, weight, bias, asked)
    if counterpart(call.fn) in _MATMULS:
        return None if weight is None else linear.product_scores(rows, b, tag, weight.mT, None, asked)
    experts = next((x for x in directions if x.ndim == 4), None)  # [K, E, d_in, d_out]
    ends = [x for x in others if isinstance(x, Tensor) and not x.is_floating_point()]
    if experts is None or len(ends) != 1 or rows.ndim != 2 or not isinstance(tag, Rows):
        return None
    return collect_rows(torch.stack([ops.contract_grouped(rows, b, p, *ends) for p in experts], 1), lead_rows(b, tag), asked)


def along(call: Call, P: Directions) -> Tensor | None:
    """What a sum's result, less its shape, moves by along ``P``, ``[K, *]``; None where ``call``, a sum, is another one."""
    terms = call.arguments()
    if counterpart(call.fn) not in _ADDS or len(terms) != 2:  # a third would scale one of them
        return None
    return _direction(call, next(x for x in terms if isinstance(x, (nn.Parameter, Ref))), P)


def _direction(call: Call, x: nn.Parameter | Ref, P: Directions) -> Tensor | None:
    """The direction ``[K, *shape]`` of an argument that is linear in parameters; None where none of these has one."""
    if not isinstance(x, Ref):
        return P.get(call.name_of(x) or "")
    if isinstance(x.call.fn, nn.Module):  # a plain lookup
        (rows,) = x.call.directions(P, "weight")
        return None if rows is None else rows[:, x.call.input]
    found = {name: P[name] for name in x.call.parameters() if name in P}
    if not found:
        return None
    K = len(next(iter(found.values())))
    return torch.stack([x.call.replay({name: p[k] for name, p in found.items()}, torch.zeros_like)[x.index] for k in range(K)])


class _Grouped(torch.autograd.Function):
    """A grouped product with a forward mode, which torch's has none of."""

    @staticmethod
    def forward(func: Callable, x: Tensor, weight: Tensor, kwargs: dict) -> Tensor:
        return func(x, weight, **kwargs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.func, x, weight, ctx.kwargs = inputs
        ctx.save_for_forward(x, weight)

    @staticmethod
    def jvp(ctx: Any, _: Any, x_tangent: Tensor | None, weight_tangent: Tensor | None, __: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        parts = []
        if x_tangent is not None:
            parts.append(ctx.func(x_tangent, weight, **ctx.kwargs))
        if weight_tangent is not None:
            parts.append(ctx.func(x, weight_tangent, **ctx.kwargs))
        return add(parts)


def grouped_product(func: Callable, x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    return _Grouped.apply(func, x, weight, kwargs)
