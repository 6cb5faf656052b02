"""What ``InRun`` is built with: checked before anything is changed, each refusal naming the argument."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.optim import OptState, read_optimizer
from adam_ghost.processes.find import refuse_unfollowed
from adam_ghost.processes.world import World
from adam_ghost.run.compiled import is_compiled
from adam_ghost.run.feedback import FEEDBACKS
from adam_ghost.run.schedules import SCHEDULES
from adam_ghost.run.store import parse_bytes
from adam_ghost.run.window import WindowOptions
from adam_ghost.step.supported import refuse_unsupported


def check_arguments(model: Any, optimizer: Any, val_loss: Any, schedule: str, rule: str, audit_every: Any) -> None:
    refuse_unfollowed(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a module that hooks can be hung on, got {type(model).__name__}: attribute it unscripted")
    if isinstance(optimizer, (list, tuple, dict)):
        raise TypeError("optimizer must be the one that trains the model: several optimizers are not supported")
    opt_state = read_optimizer(optimizer, "optimizer")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not callable(val_loss):
        raise TypeError(f"val_loss must be callable and return the validation loss, got {type(val_loss).__name__}")
    for name, value, allowed in (("schedule", schedule, SCHEDULES), ("rule", rule, opt_state.linearizations)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    refuse_unsupported(model)
    check_held({name: p for name, p in model.named_parameters() if p.requires_grad}, opt_state)
    for group in optimizer.param_groups:
        if group.get("eps") == 0:
            raise ValueError("the optimizer has eps=0: where Adam has no history yet, its step without the batch would be 0/0")
    if is_compiled(model) and schedule != "window" and (schedule != "lookahead" or audit_every):
        raise ValueError(
            "the model is compiled: its layer calls cannot be recorded, which schedule='midpoint' and audit_every need;"
            " use schedule='window', or 'lookahead' without audits, or compile nothing"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters")


def check_processes(model: nn.Module, schedule: str, world: World, audit_every: Any) -> None:
    """Raises ValueError for what takes all of a step's samples in one process."""
    if audit_every is not None:
        raise ValueError("audit_every plays with a step's samples in one process, and several train this model: audit a run of one")
    if world.sharded and schedule in ("lookahead", "window"):
        raise ValueError(f"schedule={schedule!r} is not supported where fully_shard shards the model: use 'midpoint' or 'gauss'")
    if is_compiled(model):
        raise ValueError("the model is compiled and trained by several processes, which is not supported: compile nothing")


def check_held(params: Mapping[str, Tensor], opt_state: OptState) -> None:
    foreign = [name for name, p in params.items() if p not in opt_state]
    if foreign:
        raise ValueError(
            f"the optimizer does not hold {', '.join(foreign[:6])}: one optimizer must train all trainable parameters;"
            " freeze the others with requires_grad_(False), or give them to it with add_param_group"
        )


def window_options(
    train_loss: Any,
    window: Any,
    ahead: Any,
    warm_up: Any,
    feedback: Any,
    memory: Any,
    audit_every: int | None,
    audit_samples: Any,
    refresh: int,
    model: nn.Module,
) -> WindowOptions:
    if not callable(train_loss):
        raise TypeError(
            "schedule='window' runs batches again: train_loss must be a callable of what run.batch(ids, inputs=...) is given,"
            f" returning the loss that the loop calls backward() on; got {type(train_loss).__name__}"
        )
    auto = window == "auto"
    window = 32 if auto else window
    for name, value, least in (
        ("window", window, 1),
        ("ahead", ahead, 0),
        ("warm_up", warm_up, 0),
        ("audit_samples", audit_samples, 2),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if auto and audit_every is None:
        raise ValueError("window='auto' goes by audits: give audit_every, in windows")
    if feedback not in FEEDBACKS:
        raise ValueError(f"feedback must be one of {', '.join(FEEDBACKS)}, got {feedback!r}")
    if refresh != 1:
        raise ValueError(f"refresh is of schedules that score single steps; with schedule='window' it must be 1, got {refresh}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model.compile() hides the model's calls from schedule='window': use model = torch.compile(model)")
    return WindowOptions(train_loss, window, ahead, warm_up, auto, feedback, parse_bytes(memory), audit_every, audit_samples)
