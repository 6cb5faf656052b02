"""Lists with one entry per parameter, as optimizers hold them: the table of their steps, and checks that name what is wrong."""

import torch
from torch import Tensor

from adam_ghost.reference import StepScalars

Tensors = list[Tensor | None]


def step_table(steps: list[StepScalars], device: torch.device) -> tuple[Tensor, list[int]]:
    """``steps`` as float64 ``[rows, 9]``, and the row of each parameter (empty: all share row 0).

    Scalars held in CPU tensors are read; those on an accelerator stay there and make the table one of that device.
    """
    rows = []
    if len(set(map(id, steps))) > 1:
        index: dict[StepScalars, int] = {}
        rows = [index.setdefault(s, len(index)) for s in steps]
        steps = list(index)
    else:
        steps = steps[:1]
    held = [x for s in steps for x in s if isinstance(x, Tensor)]
    if held and (torch.compiler.is_compiling() or (device.type != "cpu" and any(x.device == device for x in held))):
        return torch.stack([torch.stack([_on(device, x) for x in s]) for s in steps]), rows
    return torch.tensor([tuple(map(float, s)) for s in steps] if held else steps, dtype=torch.float64), rows


def _on(device: torch.device, x: Tensor | float) -> Tensor:
    if isinstance(x, Tensor):
        return x.to(device, torch.float64)
    # a fill can be captured into a CUDA graph; a copy of a host number, as torch.tensor makes it, cannot
    return torch.full((), x, dtype=torch.float64, device=device)


def table_steps(table: Tensor, rows: list[int], n: int) -> list[StepScalars]:
    """``step_table`` undone: one ``StepScalars`` per parameter."""
    steps = [StepScalars(*row[:6], *map(bool, row[6:])) for row in table.tolist()]
    return [steps[i] for i in rows] if rows else steps * n


def targets(params: list[Tensor], val_grads: list[Tensor]) -> tuple[int, int]:
    """The number of leading target dimensions of ``val_grads`` (0 or 1) and ``K``."""
    if not params or not val_grads:
        return 0, 1
    lead = val_grads[0].ndim - params[0].ndim
    return lead, val_grads[0].shape[0] if lead == 1 else 1


def check(params: list[Tensor], lead: int = 0, K: int = 1, /, **lists: Tensors | None) -> None:
    """Raise ValueError naming the first list and entry whose length, shape or device does not suit ``params``.

    ``lead=1``: entries are ``[K, *param]`` instead of ``[*param]``.
    """
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} entries, one per parameter, got {len(tensors)}")
        for i, (w, x) in enumerate(zip(params, tensors, strict=True)):
            expected = [K] * lead + list(w.shape)
            if x is not None and list(x.shape) != expected:
                raise ValueError(f"{name}[{i}]: expected shape {expected}, got {list(x.shape)}")
            if x is not None and x.device != params[0].device:
                raise ValueError(f"{name}[{i}]: expected a tensor on {params[0].device}, as params[0], got {x.device}")


def check_steps(params: list[Tensor], steps: list[StepScalars]) -> None:
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} entries, one per parameter, got {len(steps)}")


def row_major(tensors: Tensors) -> Tensors:
    return [None if x is None else x.contiguous() for x in tensors]
