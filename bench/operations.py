"""Operations of a training step with attribution, counted by operator: shares of the bound's that no machine's noise moves."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.throughput import VARIANTS, Setting, stepper

SETTING = Setting(layers=1, width=256, heads=4, context=64, batch=8)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _contract(a: Tensor, b: Tensor, P: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rows(a) * P.numel()  # P [K, d_out, d_in]


def _wgrad_score(a: Tensor, b: Tensor, P: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> int:
    samples = len(a) if offsets is None else len(offsets) - 1
    return 2 * _rows(a) * a.shape[-1] * b.shape[-1] + 2 * samples * P.numel()


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    # rows are of one group each: [M, d] @ [E, d, d'], contracted with [M, d'] or not; of a weight gradient, [d, M] @ [M, d']
    return 2 * a.numel() * b.shape[-1]


def _linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rows(x) * weight.numel()


# products that torch's own counter does not know
_PRODUCTS: dict[str, Callable[..., int]] = {
    "adam_ghost.contract": _contract,
    "adam_ghost.contract_grouped": _grouped,
    "adam_ghost.wgrad_score": _wgrad_score,
    "aten._grouped_mm": _grouped,
    "mkldnn._linear_pointwise": _linear,
}


class Operations(TorchDispatchMode):
    """Counts the operations of products, multiplications and additions, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out, packet = func(*args, **kwargs), func.overloadpacket
        if str(packet) in _PRODUCTS:
            self.found[str(packet)] += _PRODUCTS[str(packet)](*args, **kwargs)
        elif packet in flop_registry:
            self.found[str(packet)] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def count(variant: str, setting: Setting) -> Counter[str]:
    """The operations of one step, by operator."""
    step = stepper(variant, setting)
    with Operations() as operations:
        step()
    return operations.found


def measure(setting: Setting, experts: int) -> list[dict[str, Any]]:
    """Of the dense model and of that with ``experts``: each variant's operations, and their share of the bound's."""
    rows = []
    for number in (0, experts):
        found = {variant: count(variant, replace(setting, experts=number)) for variant in VARIANTS}
        bound = found["bound"].total()
        for variant, by_operator in found.items():
            total = by_operator.total()
            row = {"experts": number, "variant": variant, "operations": total, "of_bound": bound / total}
            rows.append(row | {"by_operator": dict(by_operator)})
    return rows
