"""What may go wrong in one of several processes, or for all; each returns what the process saw."""

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from loops import Net, batch, give_history, loss_of, parts, spread_out, train, validation
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.processes import shards, world
from adam_ghost.scores import together


def wrapped(spread="ddp"):
    model = spread_out(Net().double(), spread)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model, optimizer, run, t, skipped=False):
    x, y = batch(10 * t + distributed.get_rank(), 3)
    run.batch([3 * t + i for i in range(3)], inputs=(x, y))
    loss_of(model, x, y).backward()
    if not skipped:
        optimizer.step()
    optimizer.zero_grad()


def failing(where: str, schedule: str, spread: str = "ddp") -> str:
    """Process 1 fails in the second step; what each process raised, and that the processes are still in step afterwards."""
    model, optimizer = wrapped(spread)
    sick = where if distributed.get_rank() == 1 else ""
    calls = 0

    def val_loss():
        nonlocal calls
        calls += 1
        if sick == "val_loss" and calls == 2:
            raise ArithmeticError("no validation today")
        return validation(model, False)()

    said = "nothing"

    def train_loss(given):
        return loss_of(model, *given) if sick != "other_loss" or run.step < 2 else model(given[0]).square().sum()

    steps = 1 if where == "val_loss" else 2
    options = {"window": steps, "ahead": 0, "train_loss": train_loss} if schedule == "window" else {}
    run = ag.InRun(model, optimizer, val_loss, schedule, **options)
    try:
        for t in range(3):
            if sick == "ids" and t == 1:
                run.batch([0.5])
            if sick == "batch" and t == 1:
                x, y = batch(0, 3)
                loss_of(model, x, y).backward()  # which nobody announced
                optimizer.step()
            step(model, optimizer, run, t, skipped=t == 1 and (where == "all skip" or sick == "one skips"))
            if sick == "pruned" and t == 0:
                held = model.shift.data
                (held.to_local() if isinstance(held, DTensor) else held).mul_(0.5)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    with contextlib.suppress(RuntimeError):
        run.close()
    alike = torch.ones(1)
    distributed.all_reduce(alike)
    return f"{said} {int(alike)}"


def refused(what: str) -> str:
    model, optimizer = wrapped()
    if what == "hook":
        model.register_comm_hook(None, fp16_compress_hook)
    try:
        with ag.InRun(model, optimizer, validation(model, False)) as run:
            if what == "later-hook":
                model.register_comm_hook(None, fp16_compress_hook)
            with model.no_sync() if what == "no_sync" else contextlib.nullcontext():
                step(model, optimizer, run, 0)
            if what == "unwrapped":
                step(model.module, optimizer, run, 1)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def averaging_hook() -> int:
    model, optimizer = wrapped()
    model.register_comm_hook(None, allreduce_hook)
    with ag.InRun(model, optimizer, validation(model, False)) as run:
        step(model, optimizer, run, 0)
    return len(run.steps)


def random_validation(alike: bool) -> tuple[list, list[str], int]:
    """The losses of a validation that draws its batch and has dropout; the processes' own streams differ."""
    model, optimizer = wrapped()
    torch.manual_seed(distributed.get_rank())

    def val_loss():
        x, y = batch(int(torch.randint(10**6, ())) if alike else distributed.get_rank(), 5)
        return F.cross_entropy(F.dropout(model(x), 0.2), y)

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with ag.InRun(model, optimizer, val_loss) as run:
            for t in range(3):
                step(model, optimizer, run, t)
    drawn = int(torch.randint(10**6, ()))
    torch.manual_seed(distributed.get_rank())
    said = [str(w.message) for w in seen if "adam_ghost" in str(w.message)]
    return [s.val_loss for s in run.steps], said, drawn - int(torch.randint(10**6, ()))


def thin(spread: str, sizes: tuple[int, ...], clip: float | None) -> list[float]:
    """The thin layer's scores of one step, of two accumulated passes' second."""
    one = spread == "one"
    model = spread_out(Net().double(), spread)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cache = ag.LayerCache(model, val_loss=validation(model, False))
    for t in range(3):
        x, y = batch(t, sum(sizes))
        shares = parts(sizes)
        with cache:
            if one:
                logits = model(x)
                losses = torch.stack([F.cross_entropy(logits[s], y[s]) for s in shares])
                losses.mean().backward()
            else:
                mine = shares[distributed.get_rank()]
                loss_of(model, x[mine], y[mine]).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scores = ag.attribute(cache, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return scores.tolist()


def refused_shards(what: str) -> str:
    """How a model that is sharded in another way is refused; each raises before anything is exchanged."""
    model = Net().double()
    mesh = init_device_mesh("cpu", (2,))
    if what == "part":
        fully_shard(model.block, mesh=mesh)
    elif what == "hybrid":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts")))
    elif what == "offloaded":
        fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    else:
        fully_shard(model.block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.shift} if what == "ignored" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    try:
        options = {"schedule": "window", "train_loss": loss_of} if what in ("double", "forward", "divided_window") else {}
        options |= {"feedback": what} if what in ("double", "forward") else {}
        options |= {"fallback": True} if what == "fallback" else {}
        if what == "fallback_of_the_thin_layer":
            ag.LayerCache(model, fallback=True)
        with ag.InRun(model, optimizer, validation(model, False), **options) as run:
            if what == "unaveraged":
                model.set_requires_gradient_sync(False)
            if what == "divided":
                model.set_gradient_divide_factor(3.0)
            if what == "divided_window":
                for module in (model.block, model):
                    module.set_gradient_divide_factor(3.0)
            step(model, optimizer, run, 0)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing"


def with_small_layers(spread: str) -> tuple[dict, list]:
    """A training in lookahead whose linear layers are small, and the weights of a plain one."""
    together.SMALL, before = 1 << 20, together.SMALL
    try:
        found = train(spread, "lookahead", warm=True, steps=4)
    finally:
        together.SMALL = before
    return found, train(spread, None, warm=True, steps=4)["weights"]


def half(schedule: str | None, reshard: bool, dtype: torch.dtype = torch.bfloat16, **options) -> dict[str, Any]:
    """A training whose passes run in bfloat16, or another ``dtype``."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    wrapper = {"mp_policy": policy, "reshard_after_forward": reshard}
    return train("fsdp", schedule, dtype=torch.float32, steps=6, warm=True, wrapper=wrapper, options=options)


class Counted:
    """torch.distributed, with a list of the exchanges made through it: the function's name, and the bytes of tensors."""

    def __init__(self, made: list):
        self._made = made

    def __getattr__(self, name: str):
        real = getattr(distributed, name)
        if name not in ("all_reduce", shards.GATHER, "all_gather_object", "broadcast_object_list"):
            return real

        def call(first, *args, **kwargs):
            self._made.append((name, first.nbytes if isinstance(first, torch.Tensor) else 0))
            return real(first, *args, **kwargs)

        return call


def riding() -> tuple[list[str], int, int, int]:
    """What a backward pass of lookahead gathers, in order: weights or directions, with the elements of each process's part; and of
    whole directions the most elements held at once, then those held after it, and those of all.
    """
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4 + 2 * i), nn.Tanh(), nn.Linear(4 + 2 * i, 4)) for i in range(4)))
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        give_history(optimizer, p)
    gathered, whole, most = [], [], 0
    sizes = {4 * (4 + 2 * i) + 4 + i: f"{i}" for i in range(4)}
    real, join = getattr(distributed, shards.GATHER), shards.Shards._join
    sending = shards.Shards._gather_parts
    ours = False

    def gather(out, part, *args, **kwargs):
        gathered.append(("P" if ours else "w") + sizes[part.numel()])
        return real(out, part, *args, **kwargs)

    def send(*args):
        nonlocal ours
        ours = True
        try:
            return sending(*args)
        finally:
            ours = False

    def held():
        return sum(x.numel() for x in (ref() for ref in whole) if x is not None)

    def joined(*args):
        nonlocal most
        found = join(*args)
        whole.extend(weakref.ref(x) for x in found.values())
        most = max(most, held())
        return found

    x = torch.randn(3, 4)
    with ag.InRun(model, optimizer, lambda: model(x).square().mean(), "lookahead") as run:
        setattr(distributed, shards.GATHER, gather)
        shards.Shards._gather_parts, shards.Shards._join = send, joined
        try:
            run.batch([1, 2, 3])
            loss = model(x).square().sum()
            gathered.clear()
            loss.backward()
        finally:
            setattr(distributed, shards.GATHER, real)
            shards.Shards._gather_parts, shards.Shards._join = sending, join
        after = held()
        optimizer.step()
    return gathered, most, after, sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def counting(made: list) -> Iterator[None]:
    world.distributed = shards.distributed = Counted(made)
    try:
        yield
    finally:
        world.distributed = shards.distributed = distributed


def exchanges(spread: str, schedule: str, split: bool) -> list[tuple[str, int]]:
    """What the third step exchanges beside the training's own exchanges; of windows the fifth, which ends the second of two steps.

    In the first window's sweep differences find how far they go.
    """
    model, optimizer = wrapped(spread)
    for p in model.parameters():
        give_history(optimizer, p)
    made: list = []
    windows = {"window": 2, "ahead": 1, "train_loss": lambda given: loss_of(model, *given)} if schedule == "window" else {}
    with ag.InRun(model, optimizer, validation(model, split), schedule, val_split=split, **windows) as run:
        for t in range(5 if windows else 3):
            made.clear()
            with counting(made):
                step(model, optimizer, run, t)
    return made


def exchanges_of_training(spread: str, case: dict) -> list[tuple[str, int]]:
    """What a training exchanges beside its own exchanges, from the run's construction to its end."""
    made: list = []
    with counting(made):
        train(spread, **case)
    return made


def traffic(schedule: str, K: int, feedback: str = "differences") -> tuple[int, int, int]:
    """Elements of weights and directions gathered, and of gradients added up, in a step; in a sweep of five steps."""
    torch.manual_seed(0)
    blocks: Any = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    model: Any = nn.Sequential(blocks, nn.Linear(8, 4, bias=False))
    mesh = init_device_mesh("cpu", (2,))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        give_history(optimizer, p)
    x, seen, ours = torch.randn(3, 8), [0, 0, 0], False
    scatter = "reduce_scatter_single" if hasattr(distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    gather, add, send = getattr(distributed, shards.GATHER), getattr(distributed, scatter), shards.Shards._gather_parts

    def gathering(out, *args, **kwargs):
        seen[int(ours)] += out.numel()
        return gather(out, *args, **kwargs)

    def adding(*args, **kwargs):
        seen[2] += kwargs.get("input", args[1] if len(args) > 1 else None).numel()
        return add(*args, **kwargs)

    def sending(*args):
        nonlocal ours
        ours = True
        try:
            return send(*args)
        finally:
            ours = False

    def val_loss():
        return model(x).square().mean(0)[:K]

    def train_loss(given):
        return model(given).square().mean()

    windows = {"window": 3, "ahead": 2, "feedback": feedback, "train_loss": train_loss} if schedule == "window" else {}
    run = ag.InRun(model, optimizer, val_loss if K > 1 else lambda: val_loss()[0], schedule, **windows)
    setattr(distributed, shards.GATHER, gathering)
    setattr(distributed, scatter, adding)
    shards.Shards._gather_parts = sending
    try:
        # of windows the second: in the first sweep differences find how far they go
        for t in range(8 if windows else 1):
            run.batch([10 * t, 10 * t + 1, 10 * t + 2], inputs=x)
            train_loss(x).backward()
            if t == 7:
                seen[:] = [0, 0, 0]
            optimizer.step()
            optimizer.zero_grad()
        found = tuple(seen)
    finally:
        setattr(distributed, shards.GATHER, gather)
        setattr(distributed, scatter, add)
        shards.Shards._gather_parts = send
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.close()
    return found
