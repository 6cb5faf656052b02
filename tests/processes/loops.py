"""One loop, run by one process with the whole batch, or by several with a part of it each."""

import contextlib
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import adam_ghost as ag

D, CLASSES, VOCABULARY = 5, 3, 11
# samples of each process, in two steps that take turns
EVEN = ((3, 3), (3, 3))
UNEVEN = ((4, 2), (1, 5))
WITH_NONE = ((4, 2), (5, 0))


class Hidden(torch.autograd.Function):
    """Of unknown doings, with a forward mode."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * 2


class Net(nn.Module):
    """Every kind of layer, the embedding tied to the head; ``extra`` serves only texts that begin with an odd token.

    ``hidden``: after the block comes a function of unknown doings, from which on layer calls are lost, and a head of its own.
    """

    def __init__(self, extra: bool = False, hidden: bool = False):
        super().__init__()
        torch.manual_seed(1)
        self.tokens = nn.Embedding(VOCABULARY, 6)
        self.block = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.extra = nn.Linear(6, 6) if extra else None
        self.head = nn.Linear(6, VOCABULARY) if hidden else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)  # [n, T, 6]
        h = h + self.block(h)
        h = (h if self.head is None else Hidden.apply(h)) + self.shift
        odd = x[:, :1, None] % 2  # [n, 1, 1]
        if self.extra is not None and bool(odd.any()):
            h = h + odd * torch.tanh(self.extra(h))
        h = h.mean(1)
        return F.linear(h, self.tokens.weight) if self.head is None else self.head(h)  # [n, VOCABULARY]


def batch(step: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (n, 4), generator=g), torch.randint(VOCABULARY, (n,), generator=g)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y) if len(x) else model(x).sum() * 0


def parts(sizes: tuple[int, ...]) -> list[slice]:
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def validation(model: nn.Module, split: bool, targets: int = 0) -> Any:
    """The loss of all validation samples; of those of this process alone where it is split. ``targets``: so many losses."""
    x, y = batch(1000, 8)
    if split:
        share = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
        x, y = x[share], y[share]

    def val_loss() -> Tensor:
        logits = model(x)
        losses = [F.cross_entropy(logits, (y + k) % VOCABULARY) for k in range(max(1, targets))]
        return torch.stack(losses) if targets else losses[0]

    return val_loss


def spread_out(model: Net, spread: str, **options: Any) -> Any:
    """The model as ``one`` process, ``ddp`` or ``fsdp`` train it."""
    if spread == "ddp":
        return DistributedDataParallel(model, **options)
    if spread == "fsdp":
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for part in (model.block, model):
            fully_shard(part, mesh=mesh, **options)
    return model


def give_history(optimizer: torch.optim.Optimizer, p: Tensor) -> None:
    """A hundred steps that were never taken, the same however ``p`` is spread."""
    g = torch.Generator().manual_seed(7)
    m, v = 0.01 * torch.randn(p.shape, generator=g), 1e-4 + 1e-3 * torch.rand(p.shape, generator=g)
    moments = [x.to(p.dtype) for x in (m, v)]
    if isinstance(p, DTensor):
        moments = [distribute_tensor(x, p.device_mesh, p.placements) for x in moments]
    optimizer.state[p] = {"step": torch.tensor(100.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}


def train(
    spread: str,
    schedule: str | None,
    *,
    sizes: tuple = EVEN,
    dtype: torch.dtype = torch.float64,
    steps: int = 12,
    micro: int = 1,
    clip: float | None = None,
    split: bool = False,
    extra: bool = False,
    hidden: bool = False,
    warm: bool = False,
    wrapper: dict | None = None,
    inner: bool = False,
    targets: int = 0,
    evaluated: bool = False,
    summed: bool = False,
    options: dict | None = None,
    ledger: str | None = None,
    checkpoint: str | None = None,
    end: str = "close",
) -> dict[str, Any]:
    """What became of a training: scores by id, the weights, the books. ``spread``: ``one`` process, ``ddp`` or ``fsdp``.

    A step's loss is the mean over the processes of their samples' mean losses. ``evaluated``: passes without gradients come between
    the steps. ``summed``: gradients are added up over shards, not averaged, as torchtitan does. Training goes on from the
    ``checkpoint`` where there is one, or leaves one there after its sixth step. ``end``: the run is closed, or process 1 is killed
    in the last step, between its passes and the optimizer's step.
    """
    several = spread != "one"
    plain = Net(extra, hidden).to(dtype)
    model = spread_out(plain, spread, **(wrapper or {}))
    if summed and several:
        for part in (plain.block, model):
            part.set_gradient_divide_factor(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    for p in plain.parameters() if warm else ():
        give_history(optimizer, p)

    def train_loss(given: Any) -> Tensor:
        x, y, shares = given
        if several:
            return loss_of(model, x, y) / micro / (len(shares) if summed else 1)
        logits = model(x)
        losses = [F.cross_entropy(logits[s], y[s]) for s in shares if s.stop > s.start]
        return torch.stack(losses).sum() / len(shares) / micro

    def evaluate() -> None:
        if evaluated:
            with torch.no_grad():
                model(batch(0, 2)[0])

    run = None
    evaluate()
    if schedule is not None:
        options = dict(options or {})
        if schedule == "window":
            options = {"window": 3, "ahead": 2, "train_loss": train_loss} | options
        shown = plain if inner else model
        if ledger is not None:
            options["ledger"] = ag.LedgerWriter(ledger, flush_rows=9)
        split_here = split and several
        val_loss = validation(model, split_here, targets)
        run = ag.InRun(shown, optimizer, val_loss, schedule, val_split=split_here, **options)
    begin = 0
    if checkpoint is not None and Path(checkpoint).exists():
        load(checkpoint, plain, optimizer, run)
        begin = run.step
    for t in range(begin, steps):
        for k in range(micro):
            number = micro * t + k
            shares = parts(sizes[number % 2])
            x, y = batch(number, shares[-1].stop)
            ids = torch.arange(len(x)) + 100 * number
            if several:
                mine = shares[distributed.get_rank()]
                x, y, ids = x[mine], y[mine], ids[mine]
            given = x, y, shares
            if run is not None:
                run.batch(ids, inputs=given)
            wait = several and k < micro - 1
            if spread == "fsdp":
                model.set_requires_gradient_sync(not wait)
            with model.no_sync() if wait and spread == "ddp" else contextlib.nullcontext():
                train_loss(given).backward()
        if end == "kill" and t == steps - 1 and distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        evaluate()
        if checkpoint is not None and t == 5:
            save(checkpoint, plain, optimizer, run)
    found: dict[str, Any] = {"weights": [whole(p).clone().numpy() for p in plain.parameters()]}
    if run is not None:
        run.close()
        sums = run.scores()
        found |= {"scores": dict(zip(sums.ids, sums.total.tolist(), strict=True))}
        found |= {"standardized": dict(zip(sums.ids, sums.standardized.tolist(), strict=True))}
        found |= {"sums": [s.score_sum for s in run.steps], "totals": [s.total for s in run.steps]}
        found |= {"val_loss": [s.val_loss for s in run.steps], "by_passes": [s.by_passes for s in run.steps]}
    return found


def whole(p: Tensor) -> Tensor:
    return p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()


def save(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, run: Any) -> None:
    """By the first process, of all; or, of a sharded model, by each its shards."""
    if isinstance(model, FSDPModule):
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": moments, "run": run}, checkpoint_id=path)
        return
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        torch.save(state, path)


def load(path: str, model: nn.Module, optimizer: torch.optim.Optimizer, run: Any) -> None:
    if Path(path).is_dir():
        weights, moments = get_state_dict(model, optimizer)  # which steps an optimizer that has no state, to give it one
        dcp.load({"model": weights, "optimizer": moments, "run": run}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    run.load_state_dict(state["run"])
