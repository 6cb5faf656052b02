"""A loop in torchtitan's form: blocks sharded by fully_shard, gradients added up over processes and micro-batches for a loss per
token of them all, clipped, a container of optimizers, checkpoints by torch.distributed.checkpoint; attributed by three lines.

torchrun --nproc-per-node 2 examples/torchtitan_loop.py --ledger runs/titan
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import adam_ghost

VOCABULARY, TOKENS, WIDTH = 32, 16, 16
LOCAL_BATCH, ACCUMULATED, STEPS = 4, 2, 14


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        mixed = h.cumsum(1) / torch.arange(1, h.shape[1] + 1).view(1, -1, 1)  # looks back, as attention does
        return h + self.down(F.silu(self.up(self.norm(mixed))))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(2)})
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return self.output(self.norm(h))


def parallelize(model: Decoder) -> None:
    options = {
        "mesh": init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("fsdp",)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32),
    }
    fully_shard(model.tok_embeddings, **options)
    for layer in model.layers.values():
        fully_shard(layer, **options)
    fully_shard([model.norm, model.output], **options, reshard_after_forward=False)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by all processes' tokens
            module.set_force_sum_reduction_for_comms(True)  # gloo can but add


class OptimizersContainer:
    def __init__(self, parts: list[nn.Module]):
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1) for part in parts]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)


def batches(rank: int, size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """This process's micro-batches: ids, tokens and labels. Every third text is noise, the others count upwards."""
    for step in range(STEPS * ACCUMULATED):
        g = torch.Generator().manual_seed(step)
        first, noise = (torch.randint(VOCABULARY, (size * LOCAL_BATCH, n), generator=g) for n in (1, TOKENS + 1))
        texts = (first + torch.arange(TOKENS + 1)) % VOCABULARY
        texts[::3] = noise[::3]
        mine = slice(rank * LOCAL_BATCH, (rank + 1) * LOCAL_BATCH)
        ids = torch.arange(size * LOCAL_BATCH)[mine] + 1000 * step
        yield ids.tolist(), texts[mine, :-1], texts[mine, 1:]


def train(schedule: str, ledger: str | None, folder: str | None = None) -> adam_ghost.InRun:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = Decoder()
    parallelize(model)
    optimizers = OptimizersContainer([model])
    ahead = (torch.arange(8).view(8, 1) + torch.arange(TOKENS + 1)) % VOCABULARY

    def validate() -> Tensor:
        return cross_entropy_sum(model(ahead[:, :-1]), ahead[:, 1:]) / ahead[:, 1:].numel()

    run = adam_ghost.InRun(model, optimizers.optimizers, validate, schedule, ledger=ledger)  # 1
    data = batches(rank, size)
    for _ in range(STEPS):
        optimizers.zero_grad()
        micro_batches = [next(data) for _ in range(ACCUMULATED)]
        tokens = torch.tensor(sum(labels.numel() for _, _, labels in micro_batches))
        distributed.all_reduce(tokens)
        for k, (ids, inputs, labels) in enumerate(micro_batches):
            run.batch(ids)  # 2
            model.set_requires_gradient_sync(k == ACCUMULATED - 1)
            (cross_entropy_sum(model(inputs), labels) / tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
    if folder is not None:
        checkpoint.save({"model": model.state_dict(), "run": run}, checkpoint_id=folder)
    run.close()  # 3
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", default="runs/titan")
    parser.add_argument("--schedule", default="lookahead", choices=("midpoint", "gauss", "lookahead"))
    options = parser.parse_args()
    distributed.init_process_group("gloo")
    train(options.schedule, options.ledger)
    distributed.barrier()
    if distributed.get_rank() == 0:
        with adam_ghost.open_ledger(options.ledger) as ledger:
            worst = ledger.top(30, harmful=True)["sample"].to_pylist()
        print(f"of the 30 most harmful texts {sum(i % 1000 % 3 == 0 for i in worst)} are noise, of all a third")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
