"""Every kernel, and every configuration that may be picked, compiled for chips that are not here."""

import pytest

pytest.importorskip("triton")
from bench import compile as chips

KERNELS = {"contract", "wgrad_score", "join", "ghost_gram", "embedding_score", "norm_score", "sum_samples"}


@pytest.fixture(scope="module")
def processes():
    """All targets at once: compilation has one thread each."""
    running = {arch: chips.start(arch) for arch in chips.CHIPS}
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("arch", chips.CHIPS)
def test_compiles(processes, arch):
    kernels = chips.finish(processes[arch])
    assert {k["kernel"] for k in kernels} >= KERNELS
    spilled = [k for k in kernels if k["spills"]]
    assert not spilled, "\n".join(map(str, spilled))
    for k in kernels:
        assert not k["serialized"], k
        assert k["shared"] <= chips.SHARED[arch], k
        assert not k["matrix"] or k[chips.MATRIX[arch]] > 0, k
