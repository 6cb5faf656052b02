"""The ops under pytest-benchmark, for comparing commits: ``pytest bench/test_benchmarks.py --benchmark-only``."""

import pytest
import torch

from adam_ghost.optim import adam_op
from adam_ghost.scores import cpu
from bench.kernels import cases
from bench.ops import STEP, state

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_gpu
@pytest.mark.parametrize("who", ["ours", "library"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}, {case.shape}")
def test_kernel(benchmark, case, who):
    inputs, call = case.inputs(), getattr(case, who)

    def run():
        call(*inputs)
        torch.cuda.synchronize()

    benchmark(run)


@pytest.mark.parametrize("form", [cpu.contract, cpu.wgrad_score], ids=lambda f: f.__name__)
def test_cpu_form(benchmark, form):
    benchmark(form, *(torch.randn(s) for s in ((16, 256, 384), (16, 256, 1536), (1, 1536, 384))))


@pytest.mark.parametrize("impl", [None, "reference"])
def test_variance_correction(benchmark, impl):
    lists = state([(512, 512)] * 16, "cuda" if torch.cuda.is_available() else "cpu")
    benchmark(lambda: adam_op.variance_correction(**lists, steps=[STEP] * 16, impl=impl))
