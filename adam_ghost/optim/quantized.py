"""Adam with a state of few bits, as torchao and bitsandbytes keep it: Adam's own step, from what the state stands for."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adam_ghost.optim import lion
from adam_ghost.optim.adam import AdamState, ParamState
from adam_ghost.optim.adam_definition import StepScalars
from adam_ghost.optim.defined import Row
from adam_ghost.optim.moments import adam_scalars
from adam_ghost.optim.protocol import OptState, number, register

_ROUNDED = "the optimizer rounds its state to few bits after every step, which no derivative follows"
_BLOCK = 256  # elements that share a scale in bitsandbytes


class QuantizedAdamState(AdamState):
    """Adam's state, dequantized: a step is computed from it in float32, and only then rounded again."""

    not_carried: str | None = _ROUNDED


class _QuantizedLionState(lion.LionState):
    not_carried: str | None = _ROUNDED


def _of_torchao(optimizer: Any) -> QuantizedAdamState:
    def rows() -> Iterator[ParamState]:
        for group in optimizer.param_groups:
            for p in group["params"]:
                held = optimizer.state.get(p, {})
                m, v, v_max = (
                    None if (x := held.get(k)) is None else x.dequantize() for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
                )
                yield ParamState(p, m, v, v_max, _scalars(group, held, optimizer.is_adamw, bool(group["amsgrad"])))

    return QuantizedAdamState(rows())


def _of_bitsandbytes(optimizer: Any) -> OptState:
    """Of its ``Adam`` and ``Lion``, in 8 or 32 bits."""
    name = getattr(optimizer, "optimizer_name", type(optimizer).__name__)
    adam: list[ParamState] = []
    lions: list[Row] = []
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            config, held = optimizer.get_config(g, i, group), optimizer.state.get(p, {})
            if name not in ("adam", "lion"):
                raise TypeError(f"of bitsandbytes' optimizers, Adam, AdamW and Lion are known, got {type(optimizer).__name__}")
            for option, off in (("max_unorm", 0), ("skip_zeros", False), ("percentile_clipping", 100)):
                if config.get(option, off) not in (off, off + 0.0):
                    raise ValueError(
                        f"bitsandbytes' {option} must be {off}, with which alone its step is known; got {config[option]}"
                    )
            first, second = (_dequantized(held, k) for k in "12")
            if name == "adam":  # it decays weights as AdamW does, whatever its name
                adam.append(ParamState(p, first, second, None, _scalars(config, held, True, False)))
            else:
                beta1, beta2 = map(float, config["betas"][:2])
                scalars = lion.Scalars(number(config["lr"]), beta1, beta2, float(config["weight_decay"]))
                lions.append(Row(p, scalars, (first,)))
    return QuantizedAdamState(adam) if name == "adam" else _QuantizedLionState(lions)


def _dequantized(held: Any, which: str) -> Tensor | None:
    state = held.get(f"state{which}")
    if state is None or state.dtype != torch.uint8:
        return state
    scale = held[f"absmax{which}"].repeat_interleave(_BLOCK)[: state.numel()]
    return (held[f"qmap{which}"][state.flatten().long()] * scale).view(state.shape)


def _scalars(group: Any, held: Any, decoupled: bool, amsgrad: bool) -> StepScalars:
    return StepScalars(**adam_scalars(group, held), decoupled=decoupled, amsgrad=amsgrad)


register("torchao.optim.adam._AdamBase", _of_torchao)
register("bitsandbytes.optim.optimizer.Optimizer8bit", _of_bitsandbytes)
