"""What a result was measured on, without names of hosts or folders."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def header() -> dict[str, object]:
    """Processor, cores, software versions and commit; the GPU where there is one."""
    found: dict[str, object] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "--short", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": p.name, "memory_gib": round(p.total_memory / 2**30), "cuda": torch.version.cuda}
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    flags = "avx512" if info.exists() and "avx512f" in info.read_text() else ""
    return " ".join([names[0].split(":")[1].strip() if names else platform.machine(), flags]).strip()


def _git(*args: str) -> str:
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True).stdout.strip()
