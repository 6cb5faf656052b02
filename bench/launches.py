"""A ledger of one training step of GPT-2 124M on meta tensors: what a GPU would be asked to do, counted without one.

Real shapes and no data. Every op that is dispatched is booked by the package's source line, views apart: launches (a
``_foreach_`` op counts as one), bytes of tensors as large as a parameter, copies from the host, operand dtypes. Triton's
launchers run as on sm_90 and each kernel counts as one launch; an op of the extension counts the launches that ``csrc/cuda.cu``
makes. CUDA's autocast is imitated (bfloat16; norms and loss in float32), fused AdamW holds its step counts on the device.
Whatever waits for the device (``.item()``, ``bool()``, a copy to the host) cannot be done on meta tensors, and ends the count
with an error.

``python -m bench.launches 12 lookahead`` prints one variant's books as JSON; a process of its own, as it replaces functions of
torch's and of the package's.
"""

import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VARIANTS = ("plain", "bound", "lookahead", "midpoint", "thin layer", "window")
ROOT = Path(__file__).resolve().parent.parent
BLOCKS = 12  # of GPT-2 124M
BYTES = 48  # per parameter that a lookahead step may move beyond the bound
SLOTS = 100  # parameters of a launch, in csrc/cuda.cu


# what launches nothing
_FREE = {
    "view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
    "as_strided",
    "_unsafe_view",
    "unbind",
    "split",
    "reshape",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "lift_fresh",
    "_reshape_alias",
    "unflatten",
    "flatten",
    "is_same_size",
    "view_as",
    "result_type",
    "promote_types",
    "split_with_sizes",
    "diagonal",
    "movedim",
    "numpy_T",
    "resize_",
    "set_",
}


def budget(variant: str, bound: int, blocks: int = BLOCKS) -> int | None:
    """The launches that a step may make where plain training with a bare validation pass makes ``bound``; None: no budget."""
    layers = 2 + 6 * blocks + 2  # modules that own parameters
    return bound + 12 * layers + 30 if variant == "lookahead" else None


class Books(TorchDispatchMode):
    """Books every op while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.open = False  # whether what is done is booked
        self.clear()

    def clear(self) -> None:
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # of tensors as large as a parameter
        self.from_host: Counter[str] = Counter()  # copies by which the host waits for the device
        self.dtypes: Counter[str] = Counter()  # of the operands of kernels around products

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        space, name = func._schema.name.split("::")
        if space == "adam_ghost":
            return self._ours(name, args, kwargs)
        if name.startswith("_fused_adam"):
            self.enter(name, 1, args[:4])
            return None
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and self._crosses(args, out) and not kwargs.get("non_blocking") and True not in args[1:]:
            self.from_host[source()] += 1
        if name not in _FREE and not (name == "to" and out is args[0]):
            self.enter(name, 1, (args, kwargs, out))
        return out

    @staticmethod
    def _crosses(args: tuple, out: Any) -> bool:
        devices = {x.device.type for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)}
        return devices == {"cpu", "meta"}

    def enter(self, name: str, launches: int, tensors: Any) -> None:
        if not self.open:
            return
        named = {id(x): x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor) and x.device.type == "meta"}
        if not named:
            return
        where = f"{source()} {name}"
        self.launches[where] += launches
        self.bytes[where] += sum(x.numel() * x.element_size() for x in named.values() if x.numel() in self.sizes)

    def _ours(self, name: str, args: tuple, kwargs: dict) -> Any:
        """An op of the package: its own code runs, down to the kernels."""
        from adam_ghost.optim import adam_op
        from adam_ghost.scores import ops

        schema = getattr(torch.ops.adam_ghost, name).default._schema
        given = {p.name: p.default_value for p in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        if name in adam_op.FAKES:
            tensors = given.get("params") or given["grads"]
            launches = -(-len(tensors) // SLOTS) * (2 if name in ("variance_correction", "gradient_sums") else 1)
            # what is written in the place of an input is another pass over it, and so is the mean of what history foresees
            again = [x.detach() for x in given.get("out", ()) if any(x is y for y in given["val_grads"])]
            if given.get("foreseen"):
                launches, again = 2 * launches, again + [x.detach() for x in given["exp_avg_sqs"]]
            self.enter(name, launches + ("table" in given and given["table"].device.type == "meta"), (args, again))
            return adam_op.FAKES[name](*given.values())
        with self:
            return getattr(ops, f"_{name}_impl")(**given)

    def kernel(self, name: str, *args: Any) -> None:
        """A launch of Triton's."""
        tensors = [x.base if hasattr(x, "base") else x for x in args]
        if name == "_wgrad_score":  # a tile of G is written by it or by _join, where G is counted
            tensors = [x for x in tensors if not isinstance(x, torch.Tensor) or x.dtype != torch.float32]
        self.enter(name, 1, tensors)
        if name in ("_contract", "_contract_grouped", "_wgrad_score"):
            a, b, *_ = (getattr(x, "base", x).dtype for x in args if hasattr(x, "base") or isinstance(x, torch.Tensor))
            self.dtypes[f"{name.strip('_')}: {a} x {b}".replace("torch.", "")] += 1


def source() -> str:
    """The innermost line of the package."""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        file = frame.f_code.co_filename
        if "/adam_ghost/" in file or "/kernels/" in file:
            return f"{'/'.join(file.split('/')[-2:])}:{line}"
    return "torch"


def _on_meta(books: Books) -> None:
    """Has torch and the package treat meta tensors as a GPU's."""
    import triton
    from triton.runtime import driver

    from adam_ghost import extension, inrun
    from adam_ghost.optim import adam_op
    from adam_ghost.run import readback
    from adam_ghost.scores import ops
    from bench.compile import Driver

    driver.set_active(Driver(90))
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **options: books.kernel(kernel.__name__, *args)
    ops._in_triton = lambda impl, op, *tensors: impl != "reference"
    extension.reason = lambda device: ""

    class Arriving(readback.Readback):
        def __init__(self, x: torch.Tensor):
            x.detach().clone()  # the copy, which does not block
            self._event = None

        ready = False  # it is never asked for: nothing is there to be read

    readback.Readback = inrun.Readback = Arriving
    tensor = torch.tensor

    def to_device(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "meta":
            books.from_host[source()] += 1
        return tensor(*args, device=device, **options)

    torch.tensor = to_device
    for module in (import_module("torch.optim.adam"), import_module("torch.optim.optimizer")):
        for known in ("_get_fused_kernels_supported_devices", "_get_capturable_supported_devices"):
            if hasattr(module, known):
                setattr(module, known, lambda *args, **options: ["meta", "cuda"])
    adam_op.run = lambda name, *arguments: getattr(torch.ops.adam_ghost, name)(*arguments)
    _imitate_autocast()


class _Autocast:
    """``torch.autocast`` for meta tensors, which it does not know."""

    on = False

    def __init__(self, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: bool = True):
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before, _Autocast.on = _Autocast.on, self.enabled

    def __exit__(self, *exc: object) -> None:
        _Autocast.on = self.before


def _imitate_autocast() -> None:
    """As CUDA does it: products in bfloat16, norms and losses in float32."""

    def wrap(name: str, dtype: torch.dtype) -> None:
        plain = getattr(F, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            if _Autocast.on:
                cast = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
                args, kwargs = tuple(map(cast, args)), {k: cast(x) for k, x in kwargs.items()}
            return plain(*args, **kwargs)

        setattr(F, name, run)

    wrap("linear", torch.bfloat16)
    wrap("layer_norm", torch.float32)
    wrap("cross_entropy", torch.float32)
    enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    torch.autocast = _Autocast
    torch.is_autocast_enabled = lambda device=None: _Autocast.on if device == "meta" else enabled(device or "cpu")
    torch.get_autocast_dtype = lambda device: torch.bfloat16 if device == "meta" else dtype(device)


def count(variant: str, packed: bool = False, blocks: int = BLOCKS) -> dict[str, Any]:
    """The books of one step in the midst of a run; ``packed``: samples lie in rows, and ``batch`` is given their offsets."""
    import adam_ghost as ag
    from adam_ghost.demo.model import GPT

    books = Books()
    _on_meta(books)
    with torch.device("meta"):
        model = GPT(vocabulary=50304, context=1024, layers=blocks, width=768, heads=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    books.sizes = {p.numel() for p in model.parameters()}
    tokens, n = torch.zeros(17, 1025, dtype=torch.long, device="meta"), 16

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("meta"):
            return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    run = cache = None
    if variant == "window":
        options = {"window": 32, "ahead": 32, "train_loss": loss}  # a step that is kept: the sweep is another time
        run = ag.InRun(model, optimizer, lambda: loss(tokens[n:]), variant, **options)
    elif variant in ("lookahead", "midpoint"):
        run = ag.InRun(model, optimizer, lambda: loss(tokens[n:]), variant)
    elif variant == "thin layer":
        cache = ag.LayerCache(model, lambda: loss(tokens[n:]))
    offsets = torch.arange(0, n * 1024 + 1, 1024) if packed else None

    def step() -> None:
        if run:
            run.batch(range(n), offsets, inputs=tokens[:n])
        if cache:
            with cache:
                loss(tokens[:n]).backward()
            ag.attribute(cache, optimizer)
        else:
            loss(tokens[:n]).backward()
        if variant == "bound":
            torch.autograd.grad(loss(tokens[n:]), list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()

    with books:
        step()
        if variant == "lookahead":
            run._loop.step += 100  # it needs a history, whose length the device alone knows
        for _ in range(4):  # after which the model's ways are known
            step()
        books.clear()
        books.open = True
        step()
    count = sum(p.numel() for p in model.parameters())
    return {
        "launches": books.launches.total(),
        "bytes_per_parameter": books.bytes.total() / count,
        "waits": dict(books.from_host),
        "dtypes": dict(books.dtypes),
        "by_line": {k: [v, books.bytes[k]] for k, v in books.launches.most_common()},
    }


def measure(variants: tuple[str, ...] = VARIANTS, blocks: int = BLOCKS) -> dict[str, dict[str, Any]]:
    """``count`` of each variant (``lookahead+packed``: of packed samples), in processes of their own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "bench.launches"]
    running = {v: subprocess.Popen([*command, str(blocks), *v.split("+")], env=environment, cwd=ROOT, **pipe) for v in variants}
    found = {}
    for variant, process in running.items():
        out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{variant}: {errors[-3000:]}")
        found[variant] = json.loads(out.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[2], "packed" in sys.argv[3:], int(sys.argv[1]))))
