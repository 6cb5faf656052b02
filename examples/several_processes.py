"""Digits, a tenth of them with a wrong label, trained by several processes; the ledger has every process's scores.

torchrun --nproc-per-node 2 examples/several_processes.py --ledger runs/several [--shard]
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import adam_ghost

BATCH, EPOCHS = 32, 8  # of each process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", default="runs/several")
    parser.add_argument("--shard", action="store_true", help="fully_shard (FSDP2) instead of DistributedDataParallel")
    options = parser.parse_args()
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same data and first weights everywhere

    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits.target)[order]
    x_val, y_val, x, y = x[:300], y[:300], x[300:1300], y[300:1300].clone()
    wrong = torch.randperm(len(y))[:100]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (100,))) % 10

    net: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = fully_shard(net, mesh=init_device_mesh("cpu", (size,))) if options.shard else DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = adam_ghost.InRun(
        model, optimizer, val_loss=lambda: F.cross_entropy(model(x_val), y_val), ledger=adam_ghost.LedgerWriter(options.ledger)
    )
    for epoch in range(EPOCHS):
        shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(epoch))
        for batch in shuffled.split(BATCH * size):
            ids = batch[rank::size]
            run.batch(ids)
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()
    run.close()
    distributed.barrier()
    if rank == 0:
        with adam_ghost.open_ledger(options.ledger) as ledger:
            worst = set(ledger.top(100, harmful=True)["sample"].to_pylist())
        print(f"of the 100 most harmful samples {len(worst & set(wrong.tolist()))} have a wrong label, of 1,000 a tenth")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
