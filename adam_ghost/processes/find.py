"""How a model is spread over processes; ways that are not followed are refused by name."""

from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from adam_ghost.processes.replicas import Replicas
from adam_ghost.processes.shards import Shards, is_sharded_whole
from adam_ghost.processes.world import World

# by class name, as these classes need not be there to be imported
_REFUSED = {
    "DataParallel": "splits each batch over devices in one process: use DistributedDataParallel, or one device",
    "FullyShardedDataParallel": "(FSDP1) flattens parameters: use fully_shard (FSDP2) of torch.distributed.fsdp",
    "DeepSpeedEngine": "keeps parameters and gradients of its own: use fully_shard (FSDP2), or DistributedDataParallel",
    "PipelineEngine": "runs parts of the model in other processes: use DistributedDataParallel",
    "PipelineStage": "runs a part of the model: use DistributedDataParallel",
}


def find_world(model: nn.Module) -> tuple[nn.Module, World]:
    """The model without its wrapper, and the processes that train it.

    Raises TypeError, by name, for a model spread in a way that is not followed.
    """
    refuse_unfollowed(model)
    if isinstance(model, DistributedDataParallel):
        return model.module, Replicas(model)
    if is_sharded_whole(model):
        return model, Shards(model)
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    # wrapped later, or by somebody else
    return model, Replicas(None) if several else World()


def refuse_unfollowed(model: Any) -> None:
    """Raises TypeError for a model, or whatever came in its place, that no process has whole."""
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {"": model}
    for name, module in modules.items():
        where = f"'{name}' of model" if name else "model"
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise TypeError(f"{where} is a {kind.__name__}, which is not supported: it {_REFUSED[kind.__name__]}")
        if name and isinstance(module, DistributedDataParallel):
            raise TypeError(f"{where} is a DistributedDataParallel: wrap the whole model, or none of it")
    if not isinstance(model, nn.Module) or is_sharded_whole(model):
        return
    for name, p in model.named_parameters():
        if _is_sharded(p):
            raise TypeError(
                f"'{name}' is a DTensor of its own (tensor parallel), which is not supported: use DistributedDataParallel"
            )


def _is_sharded(p: Tensor) -> bool:
    return any(kind.__name__ == "DTensor" for kind in (*type(p).__mro__, *type(p.data).__mro__))
