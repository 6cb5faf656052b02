"""A small attributed training on a GPU, in which nothing may wait for the device, beside the same on the CPU.

``python -m bench.synced`` raises where a step synchronises (``torch.cuda.set_sync_debug_mode("error")``), and where scores are not
the CPU's.
"""

import sys

import torch
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.model import GPT

STEPS, FREE = 16, 4  # the first of which may wait: kernels compile, memory is found


def train(schedule: str, device: str) -> torch.Tensor:
    """``[samples]``: total scores of a few steps, in float32."""
    torch.manual_seed(0)
    model = GPT(65, 32, layers=2, width=64, heads=2).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device != "cpu")
    tokens = torch.randint(0, 65, (10, 33), generator=torch.Generator().manual_seed(0)).to(device)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    with ag.InRun(model, optimizer, lambda: loss(tokens[8:]), schedule) as run:
        for k in range(STEPS):
            if device != "cpu":
                torch.cuda.set_sync_debug_mode("error" if k >= FREE else "default")
            run.batch(range(8))
            loss(tokens[:8]).backward()
            optimizer.step()
            optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.set_sync_debug_mode("default")
        return torch.as_tensor(run.scores().total)


def main(device: str) -> None:
    for schedule in ("midpoint", "gauss", "lookahead"):
        got, want = train(schedule, device), train(schedule, "cpu")
        error = ((got - want).norm() / want.norm()).item()
        print(f"{schedule}: no synchronisation from step {FREE + 1} on; scores differ from the CPU's by {error:.1e}")
        if not error <= 1e-3:  # sums in another order, carried through sixteen steps of float32
            raise SystemExit(f"{schedule}: the scores are not those of the CPU")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
