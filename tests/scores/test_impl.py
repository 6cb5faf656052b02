"""What people call gives the same scores through the kernels as through their definitions."""

import pytest
import torch
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.demo.model import GPT
from adam_ghost.scores import ops
from bench.experts import with_experts

if not torch.cuda.is_available():
    pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY, CONTEXT, N = 24, 12, 4


def trained(dtype, experts=0):
    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, layers=2, width=16, heads=2)
    model = (with_experts(model, experts) if experts else model).to(DEVICE, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCABULARY, (14, N, CONTEXT + 1), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    loss = lambda x: F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())  # noqa: E731
    for x in tokens[2:]:
        loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, loss, *tokens[:2]


def attribute(dtype, experts=0, **options):
    model, optimizer, loss, x, x_val = trained(dtype, experts)
    cache = ag.LayerCache(model, lambda: loss(x_val))
    with cache:
        loss(x).backward()
    return ag.attribute(cache, optimizer, **options)


def in_run(schedule):
    def scores(dtype):
        model, optimizer, loss, x, x_val = trained(dtype)
        with ag.InRun(model, optimizer, lambda: loss(x_val), schedule) as run:
            run.batch(range(N))
            loss(x).backward()
            optimizer.step()
            return torch.tensor(run.scores().total)

    return scores


def gram(preconditioner):
    def pairs(dtype):
        model, optimizer, loss, x, _ = trained(dtype)
        cache = ag.LayerCache(model)
        with cache:
            loss(x).backward()
        return ag.gram(cache, optimizer, preconditioner=preconditioner)

    return pairs


CALLS = {
    "attribute": attribute,
    "attribute per token": lambda dtype: attribute(dtype, per_token=True),
    "midpoint": in_run("midpoint"),
    "lookahead": in_run("lookahead"),
    "gram factored": gram("factored"),
}


def watched(monkeypatch):
    """What the choice of an implementation was asked for, from now on: ``(impl, op)``."""
    served, in_triton = [], ops._in_triton

    def noted(impl, op, *tensors):
        served.append((impl, op))
        return in_triton(impl, op, *tensors)

    monkeypatch.setattr(ops, "_in_triton", noted)
    return served


@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_give_the_scores_of_the_definitions(name, monkeypatch):
    """The kernels' scores err from float64's no more than float32's definitions do, up to the rounding of their sums."""
    served = watched(monkeypatch)
    with ops.using("triton"):
        ours = CALLS[name](torch.float32).double()
    assert {op for impl, op in served if impl == "triton"} >= {"gram factored": {"ghost_gram"}, "lookahead": {"wgrad_score"}}.get(
        name, {"contract", "embedding_score", "norm_score"}
    )
    with ops.using("reference"):
        eager, exact = CALLS[name](torch.float32).double(), CALLS[name](torch.float64).double()
    terms = N * CONTEXT * sum(p.numel() for p in trained(torch.float32)[0].parameters())
    bound = (eager - exact).norm() + terms**0.5 * torch.finfo(torch.float32).eps * exact.norm()
    assert (ours - exact).norm() <= bound


@pytest.mark.parametrize("per_token", [False, True], ids=["samples", "tokens"])
def test_a_mixture_of_experts_is_contracted_by_its_kernel(per_token, monkeypatch):
    """In float32, the one precision that grouped products have on every device."""
    served = watched(monkeypatch)
    with ops.using("triton"):
        ours = attribute(torch.float32, experts=4, per_token=per_token)
    assert ("triton", "contract_grouped") in served
    with ops.using("reference"):
        torch.testing.assert_close(ours, attribute(torch.float32, experts=4, per_token=per_token), rtol=1e-4, atol=1e-9)
