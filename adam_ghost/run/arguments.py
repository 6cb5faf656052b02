"""What ``InRun`` is built with: checked before anything is changed, each refusal naming the argument."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adam_ghost.optim import OptState, listed, read_optimizer
from adam_ghost.optim.adam import AdamState
from adam_ghost.processes.find import refuse_unfollowed
from adam_ghost.processes.shards import settle
from adam_ghost.processes.world import World
from adam_ghost.run.compiled import is_compiled
from adam_ghost.run.feedback import FEEDBACKS, OF_PARTS
from adam_ghost.run.schedules import SCHEDULES
from adam_ghost.run.store import parse_bytes
from adam_ghost.run.window import WindowOptions
from adam_ghost.step.supported import refuse_unsupported
from adam_ghost.step.validation import check_callable

# what windows alone read, and how InRun has it where it is not given
_WINDOWS = {"window": 32, "ahead": 32, "bounded": True, "feedback": "auto", "memory": None, "audit_samples": 4}


def check_arguments(model: Any, optimizer: Any, val_loss: Any, schedule: str, rule: str | None, audit_every: Any) -> str:
    """Returns the rule: the optimizer's own, where none is named."""
    refuse_unfollowed(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must be a module that hooks can be hung on, got {type(model).__name__}: attribute it unscripted")
    settle(model)
    opt_state = read_optimizer(optimizer, "optimizer")
    for each in listed(optimizer):
        if not isinstance(each, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, or a list of them, got {type(each).__name__}")
    check_callable(val_loss)
    rule = opt_state.linearizations[0] if rule is None else rule
    for name, value, allowed in (("schedule", schedule, SCHEDULES), ("rule", rule, opt_state.linearizations)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if schedule == "window" and opt_state.not_carried is not None:
        raise ValueError(f"schedule='window' carries credit through the optimizer's steps, but {opt_state.not_carried}")
    if schedule == "lookahead" and opt_state.not_foreseen is not None:
        raise ValueError(f"schedule='lookahead' forms directions before gradients, but {opt_state.not_foreseen}")
    refuse_unsupported(model)
    check_held({name: p for name, p in model.named_parameters() if p.requires_grad}, opt_state)
    for group in (group for each in listed(optimizer) for group in each.param_groups):
        if group.get("eps") == 0:
            raise ValueError("the optimizer has eps=0: where Adam has no history yet, its step without the batch would be 0/0")
    if is_compiled(model) and schedule != "window" and (schedule != "lookahead" or audit_every):
        raise ValueError(
            "the model is compiled: its layer calls cannot be recorded, which schedule='midpoint' and audit_every need;"
            " use schedule='window', or 'lookahead' without audits, or compile nothing"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameters")
    return rule


def check_processes(model: nn.Module, optimizer: Any, schedule: str, feedback: str, world: World, audit_every: Any) -> None:
    """Raises ValueError for what takes all of a step's samples in one process."""
    if audit_every is not None:
        raise ValueError("audit_every plays with a step's samples in one process, and several train this model: audit a run of one")
    if world.sharded and type(read_optimizer(optimizer)) is not AdamState:
        raise ValueError("where fully_shard shards the model, one Adam or AdamW of torch.optim must train it")
    if world.sharded and schedule == "window" and feedback not in OF_PARTS:
        raise ValueError(
            f"feedback={feedback!r} is not supported where fully_shard shards the model, whose gradients come to .grad alone:"
            f" use one of {', '.join(OF_PARTS)}"
        )
    if is_compiled(model):
        raise ValueError("the model is compiled and trained by several processes, which is not supported: compile nothing")


def check_held(params: Mapping[str, Tensor], opt_state: OptState) -> None:
    foreign = [name for name, p in params.items() if p not in opt_state]
    if foreign:
        raise ValueError(
            f"the optimizer does not hold {', '.join(foreign[:6])}: all trainable parameters must be trained; freeze the others"
            " with requires_grad_(False), give them to it with add_param_group, or give a list of the optimizers that train them"
        )


def window_options(
    schedule: str, train_loss: Any, given: Mapping[str, Any], audit_every: int | None, refresh: int, model: nn.Module
) -> WindowOptions | None:
    """Of ``schedule="window"``; None of others, which ``given`` options of windows would not reach."""
    if schedule != "window":
        lost = [name for name, value in given.items() if value != _WINDOWS[name]]
        if lost:
            raise ValueError(f"schedule={schedule!r} scores single steps, and knows no {', '.join(lost)}: that is of 'window'")
        return None
    window, ahead, bounded, feedback = (given[name] for name in ("window", "ahead", "bounded", "feedback"))
    if not callable(train_loss):
        raise TypeError(
            "schedule='window' runs batches again: train_loss must be a callable of what run.batch(ids, inputs=...) is given,"
            f" returning the loss that the loop calls backward() on; got {type(train_loss).__name__}"
        )
    auto = window == "auto"
    window = 32 if auto else window
    for name, value, least in (("window", window, 1), ("ahead", ahead, 0), ("audit_samples", given["audit_samples"], 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if auto and audit_every is None:
        raise ValueError("window='auto' goes by audits: give audit_every, in windows")
    if not isinstance(bounded, bool):
        raise TypeError(f"bounded must be True or False, got {bounded!r}")
    if feedback not in ("auto", *FEEDBACKS):
        raise ValueError(f"feedback must be one of auto, {', '.join(FEEDBACKS)}, got {feedback!r}")
    if refresh != 1:
        raise ValueError(f"refresh is of schedules that score single steps; with schedule='window' it must be 1, got {refresh}")
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError("model.compile() hides the model's calls from schedule='window': use model = torch.compile(model)")
    memory, audit_samples = parse_bytes(given["memory"]), given["audit_samples"]
    return WindowOptions(train_loss, window, ahead, bounded, auto, feedback, memory, audit_every, audit_samples)
