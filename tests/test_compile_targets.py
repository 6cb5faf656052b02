"""Every kernel, and every configuration that may be picked, compiled for chips that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# bytes of shared memory that one block may have
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = {80: "mma", 90: "wgmma", 100: "tcgen05"}


@pytest.fixture(scope="module")
def workers():
    """All targets at once: compilation has one thread each."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    worker = Path(__file__).parent / "compile_worker.py"
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = {arch: subprocess.Popen([sys.executable, worker, str(arch)], env=environment, **pipe) for arch in SHARED}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("arch", SHARED)
def test_compiles(workers, arch):
    out, errors = workers[arch].communicate()
    assert workers[arch].returncode == 0, errors[-2000:]
    kernels = [json.loads(line) for line in out.splitlines()]
    assert {k["kernel"] for k in kernels} >= {
        "contract",
        "wgrad_score",
        "join",
        "ghost_gram",
        "embedding_score",
        "norm_score",
        "sum_samples",
    }
    spilled = [k for k in kernels if k["spills"]]
    assert not spilled, "\n".join(map(str, spilled))
    for k in kernels:
        assert not k["serialized"], k
        assert k["shared"] <= SHARED[arch], k
        assert not k["matrix"] or k[MATRIX[arch]] > 0, k
