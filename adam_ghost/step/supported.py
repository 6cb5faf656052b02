"""Models whose scores would be wrong without a word, refused by name before anything is changed."""

from torch import Tensor, distributed, nn

# by class name, as these classes need not be there to be imported
_WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel averages gradients over processes",
    "DataParallel": "DataParallel splits each batch over devices",
    "FullyShardedDataParallel": "FullyShardedDataParallel (FSDP) shards parameters over processes",
    "FSDPModule": "fully_shard (FSDP2) shards parameters over processes",
    "DeepSpeedEngine": "DeepSpeed keeps parameters and gradients of its own",
}


def refuse_unsupported(model: nn.Module) -> None:
    """Raises TypeError, by name, for models spread over several processes or devices, and for complex parameters."""
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _WRAPPERS:
                where = f"'{name}' of model" if name else "model"
                raise TypeError(f"{where} is a {kind.__name__}, which is not supported: {_WRAPPERS[kind.__name__]}")
    for name, p in model.named_parameters():
        if _is_sharded(p):
            raise TypeError(f"'{name}' is a DTensor, sharded over processes (FSDP2, tensor parallel), which is not supported")
        if p.requires_grad and p.is_complex():
            raise TypeError(f"'{name}' is complex ({p.dtype}), which is not supported: keep its real and imaginary parts apart")
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise TypeError(
            f"torch.distributed runs {distributed.get_world_size()} processes: gradients summed over processes are not"
            " supported; run on one process, or attribute after the training from one process"
        )


def _is_sharded(p: Tensor) -> bool:
    return any(kind.__name__ == "DTensor" for kind in (*type(p).__mro__, *type(p.data).__mro__))
