"""Facts from the machine code of kernels compiled for chips that need not be here: what a sample's end costs, how wide stores are.

Triton brings ``nvdisasm`` and ``cuobjdump``; its own kernels are disassembled by ``bench.compile``, the extension's CUDA kernels
as they lie in it.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

REGISTERS, SHARED, THREADS = 65536, 228 * 1024, 2048  # of an sm_90 multiprocessor
_MATRIX = re.compile(r"HGMMA|HMMA|UTCHMMA|UTCQMMA")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*);")


def tool(name: str) -> str | None:
    """The path of NVIDIA's ``name``, beside Triton's assembler or on the path."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    return (bundled and shutil.which(name, path=str(bundled))) or shutil.which(name)


class Loop(NamedTuple):
    start: int  # indices of instructions
    end: int


class Code:
    """One kernel's instructions in order, with the branches between them as indices of instructions."""

    def __init__(self, listing: str):
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        addresses: dict[int, int] = {}
        for line in listing.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif found := _LINE.search(line):
                addresses[int(found[1], 16)] = len(self.instructions)
                self.instructions.append(found[2].strip())
        self.branches: list[tuple[int, int]] = []  # from, to
        for i, text in enumerate(self.instructions):
            if text.startswith("BRA"):
                if label := re.search(r"\.L_x_\d+", text):
                    self.branches.append((i, labels[label[0]]))
                elif address := re.search(r"0x([0-9a-f]+)", text):
                    self.branches.append((i, addresses.get(int(address[1], 16), i)))

    def count(self, pattern: str, where: range | None = None) -> int:
        return sum(bool(re.match(pattern, self.instructions[i])) for i in where or range(len(self.instructions)))

    def loops(self) -> list[Loop]:
        """Those that hold matrix products, innermost first."""
        found = {Loop(to, at) for at, to in self.branches if to <= at}
        holding = [x for x in found if self.count(_MATRIX.pattern, range(x.start, x.end + 1))]
        return sorted(holding, key=lambda x: x.end - x.start)

    def rare(self, loop: Loop) -> set[int]:
        """Instructions of a loop that a branch within it may skip, with the products of a sample's end among them."""
        for at, to in sorted(self.branches, key=lambda b: b[0] - b[1]):
            if loop.start <= at < to <= loop.end and self.count("FFMA", range(at, to)) >= 32:
                return set(range(at + 1, to))
        return set()

    def chain(self) -> int:
        """The longest chain of float multiply-adds in which each needs the one before, through its addend, in a row."""
        depth: Counter[str] = Counter()
        longest = 0
        for text in self.instructions:
            registers = re.findall(r"\bR\d+\b", text)
            if text.startswith("FFMA") and len(registers) >= 3:
                depth[registers[0]] = depth[registers[-1]] + 1
                longest = max(longest, depth[registers[0]])
            elif registers and not text.startswith(("ST", "BRA", "HGMMA")):
                depth.pop(registers[0], None)
        return longest


def widest(code: Code, kind: str) -> int:
    """Bits of the widest global store (``ST``) or load (``LD``)."""
    return max(
        (int(m[1] or 32) for x in code.instructions if (m := re.match(kind + r"G\.E(?:\.\w+)*?(?:\.(64|128))?\b", x))), default=0
    )


def of_matrix_kernel(listing: str) -> dict[str, int]:
    """What a step and the end of a sample cost a kernel around matrix products: barriers, fences, fetches that are begun."""
    code = Code(listing)
    loops = code.loops()
    if not loops:
        return {}
    inner = loops[0]
    rare = code.rare(inner)
    often = [i for i in range(inner.start, inner.end + 1) if i not in rare]
    # without a branch for it, the end of a sample is what the next loop around does besides, or all of the kernel
    around = loops[1] if len(loops) > 1 else Loop(0, len(code.instructions) - 1)
    end = sorted(rare) or [i for i in range(around.start, around.end + 1) if not inner.start <= i <= inner.end]
    return {
        "barriers per step": code.count("BAR", often),
        "barriers per end": code.count("BAR", end),
        "fences per end": code.count("MEMBAR|FENCE", end),
        "fetches per end": code.count("UTMALDG|LDGSTS", end),
        "chain": code.chain(),
        "store bits": widest(code, "ST"),
    }


def blocks(registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    per_warp = -(-registers // 8) * 8 * 32
    return min(REGISTERS // (per_warp * warps), SHARED // (shared + 1024), THREADS // (32 * warps))


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile("wb", suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("nvdisasm")), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def of_extension(path: str, arch: str = "sm_90a") -> dict[str, dict[str, int]]:
    """Per CUDA kernel of the extension: widest accesses, barriers, registers, blocks on a multiprocessor."""
    command = [str(tool("cuobjdump")), "-arch", arch]
    listing = subprocess.run([*command, "-sass", path], capture_output=True, text=True, check=True).stdout
    usage = subprocess.run([*command, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used = {name: (int(r), int(s)) for name, r, s in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)}
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, text = part.split("\n", 1)
        code, (registers, shared) = Code(text), used[name]
        plain = re.sub(
            r"^.*?(correct|derive_on_device|pull_back_adjoint|move_weights|add_up)(?:ILi(\d)ELi(\d)E)?.*$", r"\1 \2 \3", name
        )
        found[plain.strip()] = {
            "store bits": widest(code, "ST"),
            "load bits": widest(code, "LD"),
            "wide stores": code.count(r"STG\.E(?:\.\w+)*\.128"),
            "barriers": code.count("BAR"),
            "registers": registers,
            "blocks": blocks(registers, shared, 8),
        }
    return found
