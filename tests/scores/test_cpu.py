"""The CPU's products: exact in full precision, close where bfloat16 was allowed, and part of the graph where one is asked for."""

import pytest
import torch

import adam_ghost as ag
from adam_ghost.scores import cpu, definition

needs_bfloat16 = pytest.mark.skipif(not cpu.multiplies_bfloat16(), reason="this processor does not multiply bfloat16")


def operands(n=4, T=64, d_in=256, d_out=1024, K=2, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) for shape in ((n, T, d_in), (n, T, d_out), (K, d_out, d_in))]


def exact(a, b, P):
    return definition.contract(a.double(), b.double(), P.double()).sum(1)


def error(found, want):
    return float((found.double() - want).norm() / want.norm())


@pytest.mark.parametrize("shape", [{}, {"T": 1}, {"T": 0}, {"d_out": 3, "d_in": 5}], ids=["large", "short", "empty", "small"])
def test_contract(shape):
    a, b, P = operands(**shape)
    torch.testing.assert_close(cpu.contract(a, b, P).double(), exact(a, b, P), rtol=1e-4, atol=1e-3)


def test_half_rounds_large_products_alone():
    large, small = operands(), operands(n=2, T=8, d_in=16, d_out=16)
    # three roundings to 8 bits each, on sums of terms of random sign
    assert 1e-4 < error(cpu.contract(*large, half=True), exact(*large)) < 3 * 2**-8
    assert torch.equal(cpu.contract(*small, half=True), cpu.contract(*small))
    double = [x.double() for x in large]
    assert torch.equal(cpu.contract(*double, half=True), cpu.contract(*double))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_linear(dtype):
    a, _, P = operands(dtype=dtype)
    a, weight = a.flatten(0, 1), P[0]
    torch.testing.assert_close(cpu.linear(a, weight), torch.nn.functional.linear(a, weight), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cpu.linear(a @ weight.T, weight.t()), a @ weight.T @ weight, rtol=1e-5, atol=1e-2)
    assert cpu.linear(a, weight.clone().requires_grad_()).requires_grad


@needs_bfloat16
def test_run_rounds_unless_told_not_to():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 256)
    found = {}
    for half in (None, True, False):
        torch.manual_seed(1)
        model = torch.nn.Linear(256, 1024)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with ag.InRun(model, optimizer, lambda model=model: model(x[:2]).square().mean(), half=half) as run:
            run.batch(range(8))
            model(x).square().mean().backward()
            optimizer.step()
            found[half] = torch.tensor(run.scores().total)
    assert torch.equal(found[None], found[True])
    assert 0 < error(found[True], found[False]) < 3 * 2**-8
