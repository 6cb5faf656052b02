"""Compiles every kernel, in every configuration that may be picked, for chips that need not be there, through the launchers.

A driver that only names its target stands in for the GPU, meta tensors for data, and launches stop after compilation. Each
chip is compiled for in a process of its own: ``python -m bench.compile 90`` writes the facts of each kernel as JSON lines.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from adam_ghost.kernels import contract, embedding, ghost_gram, grouped, norm, ragged, wgrad_score
from bench import sass

CHIPS = (80, 90, 100)
# bytes of shared memory that one block may have (sm_80's list serves sm_86, 89 and 120, too), and the chip's matrix instruction
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}
HALF, SINGLE = torch.bfloat16, torch.float32
ROOT = Path(__file__).resolve().parent.parent


def start(arch: int) -> subprocess.Popen:
    """A process that compiles for ``arch``; to be handed to ``finish``."""
    # the interpreter's kernels cannot be compiled
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "bench.compile", str(arch)], env=environment, cwd=ROOT, **pipe)


def finish(process: subprocess.Popen) -> list[dict[str, Any]]:
    """One entry per kernel and configuration; raises RuntimeError where one does not compile."""
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return [json.loads(line) for line in out.splitlines()]


class Driver:
    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def meta(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def facts(kernel, arch: int) -> dict[str, int | bool]:
    """What ptxas says of the kernel, and which instructions it has."""
    ptx = kernel.asm["ptx"]
    assembler = get_ptxas(arch).path
    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    code = sass.of_matrix_kernel(sass.disassemble(kernel.asm["cubin"])) if arch == 90 and "wgmma.mma_async" in ptx else {}
    return {
        **code,
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "bulk copies": ptx.count("cp.async.bulk.tensor"),
        "serialized": "C7511" in log or "serialized" in log,
    }


def ragged_steps(n: int, N: int, BT: int) -> ragged.Steps:
    steps = N // BT + n
    return ragged.Steps(
        n, steps, meta(n + 1, dtype=torch.int32), meta(steps + 1, dtype=torch.int32), meta(n + 1, dtype=torch.int64)
    )


def launches(arch: int) -> Iterator[tuple[str, bool]]:
    """Launches everything that may run on ``arch``; yields what was launched, and whether it must use matrix instructions."""
    n, T, d_in, d_out = 16, 1024, 768, 3072
    offsets = meta(n + 1, dtype=torch.int64)
    for dtype, able in ((HALF, True), (HALF, False), (SINGLE, False)):
        if able and arch < 90:
            continue
        matrix = dtype == HALF
        a, b = meta(n, T, d_in, dtype=dtype), meta(n, T, d_out, dtype=dtype)
        flat = a.flatten(0, 1), b.flatten(0, 1)
        for c in contract.configs(arch, dtype, able):
            contract._launch(*flat, meta(1, d_out, d_in, dtype=dtype), c)
            yield f"{dtype} {c}", matrix
        for c in grouped.configs(arch, dtype):
            for kept, P in (("in, out", meta(8, d_in, d_out, dtype=dtype)), ("out, in", meta(8, d_out, d_in, dtype=dtype).mT)):
                grouped.contract_grouped(*flat, P, meta(8, dtype=torch.int32), c)
                yield f"{dtype} {c} [E, {kept}]", matrix
        for c in wgrad_score.configs(arch, dtype, able):
            for K, packed in ((1, False), (3, False), (1, True)):
                plan = ragged_steps(n, n * T, c.BT) if packed else None
                samples = [x.view(1, -1, x.shape[-1]) for x in flat] if packed else (a, b)
                wgrad_score._launch(*samples, meta(K, d_out, d_in, dtype=dtype), plan, c)
                yield f"{dtype} {c} K={K}{' ragged' * packed}", matrix
        for c in (ghost_gram.choose(arch, dtype, able),):
            for tokens, scaled in ((1, True), (16, False), (256, True)):
                x, y = meta(64, tokens, d_in, dtype=dtype), meta(64, tokens, d_out, dtype=dtype)
                scales = (meta(d_out, dtype=SINGLE), meta(d_in, dtype=SINGLE)) if scaled else (None, None)
                ghost_gram._launch(x, y, x, y, *scales, None, None, 64, 64, True, c)
                yield f"{dtype} {c} T={tokens}{' scaled' * scaled}", matrix
            if not able:
                scales = meta(d_out, dtype=SINGLE), meta(d_in, dtype=SINGLE)
                ghost_gram._launch(*flat, *flat, *scales, offsets, offsets, n, n, False, c)
                yield f"{dtype} {c} ragged scaled", matrix
    # float32 by tf32, where the user's PyTorch allows it
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    a, b, P = meta(n, T, d_in, dtype=SINGLE), meta(n, T, d_out, dtype=SINGLE), meta(1, d_out, d_in, dtype=SINGLE)
    contract._launch(a.flatten(0, 1), b.flatten(0, 1), P, contract.configs(arch, SINGLE, False)[0])
    wgrad_score._launch(a, b, P, None, wgrad_score.configs(arch, SINGLE, False)[0])
    ghost_gram._launch(a, b, a, b, None, None, None, None, n, n, True, ghost_gram.choose(arch, SINGLE, False))
    yield "tf32", True
    # strides past 2^31
    wide = torch.empty(1, dtype=HALF, device="meta").as_strided((2, 64, 64), (2**31, 64, 1))
    c = wgrad_score.configs(arch, HALF, False)[0]
    wgrad_score._launch(wide, wide, meta(1, 64, 64), None, c)
    yield f"{c} samples 2^31 elements apart", True
    ragged.aligned(flat[0], ragged_steps(n, n * T, 64), 64)
    yield "aligned", False
    embedding.embedding_score(meta(n, T, dtype=torch.int64), meta(n, T, d_in), meta(1, 50257, d_in, dtype=SINGLE))
    yield "embedding", False
    embedding.embedding_score(meta(n * T, dtype=torch.int64), meta(n * T, d_in), meta(1, 50257, d_in), offsets=offsets)
    yield "embedding ragged", False
    for kind, d in (("layer", 768), ("rms", 8192)):
        P = meta(1, d, dtype=SINGLE)
        norm.norm_score(meta(n, T, d), meta(n, T, d), P, P if kind == "layer" else None, 1e-5, kind)
        yield f"{kind} norm of {d}", False


def main(arch: int) -> None:
    driver.set_active(Driver(arch))
    launched, run = [], triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.__name__, compiled))

    triton.JITFunction.run = compile_only
    seen = set()
    for case, matrix in launches(arch):
        for name, compiled in launched:
            if id(compiled) not in seen:
                seen.add(id(compiled))
                must = matrix and name in ("_contract", "_contract_grouped", "_wgrad_score", "_ghost_gram")
                print(json.dumps({"kernel": name.strip("_"), "case": case, "matrix": must, **facts(compiled, arch)}), flush=True)
        launched.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]))
