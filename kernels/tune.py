"""Which configuration runs: the fastest of a short list, timed once per key in a process.

Keys hold what the best tile depends on (feature sizes, dtype, form); never the number of samples or tokens, which vary from
batch to batch, so that a run does not stop to tune in its middle.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

from adam_ghost.kernels.device import INTERPRETED

Config = TypeVar("Config")
_fastest: dict[Hashable, object] = {}


def fastest(key: Hashable, configs: Sequence[Config], launch: Callable[[Config], object]) -> Config:
    """The configuration for which ``launch``, free of side effects, is fastest; the first where nothing can be timed."""
    if len(configs) == 1 or INTERPRETED or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return configs[0]
    key = (key, torch.cuda.current_device(), configs[0])
    if key not in _fastest:
        _fastest[key] = min(configs, key=lambda config: _milliseconds(launch, config))
    return _fastest[key]


def _milliseconds(launch: Callable[[Config], object], config: Config) -> float:
    try:
        launch(config)
    except OutOfResources:
        return float("inf")
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch(config)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2]
