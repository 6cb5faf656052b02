"""Every kernel, and every configuration that may be picked, compiled for chips that are not here."""

import pytest

pytest.importorskip("triton")
from bench import compile as chips

KERNELS = {
    "contract", "contract_grouped", "wgrad_score", "join", "align", "ghost_gram", "embedding_score", "norm_score", "sum_samples",
}  # fmt: skip


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
        assert k["shared"] <= chips.SHARED[arch], k  # of the smallest chip that runs the same
        assert not k["matrix"] or k[chips.MATRIX[arch]] > 0, k
        if k["kernel"] == "wgrad_score" and "held=True" in k["case"] and "K=1" in k["case"] and arch == 90:
            # the fetches of the next sample are under way while this one ends
            assert k["fences per end"] == k["fetches per end"] == 0 and k["barriers per end"] <= 4, k


def test_consumer_chips_run_what_fits_them():
    """They have 99 kB of shared memory: sm_86 and sm_89, and sm_120, whose number is larger than that of chips with 227 kB."""
    for kernel in (chips.contract, chips.wgrad_score):
        assert kernel.configs(120, chips.HALF, True) == kernel.configs(80, chips.HALF, False)
    assert chips.grouped.configs(120, chips.HALF) == chips.grouped.configs(80, chips.HALF)
    assert chips.ghost_gram.choose(120, chips.HALF, True) == chips.ghost_gram.choose(80, chips.HALF, False)
