"""Choosing within a step: the gradient is that of the chosen alone, and who is chosen is who should be."""

import copy

import pytest
import torch
from models import ONE, SEQUENCES, D, N, problem
from oracles import close, gradients, gradients_one_by_one
from torch import nn

import adam_ghost as ag
from adam_ghost.step import step
from adam_ghost.use import choose, reweigh, select, weigh

KINDS = ONE | SEQUENCES
NAMES = [
    "linear-2d",
    "linear-4d",
    "conv2d",
    "groupnorm",
    "bilinear",
    "prelu",
    "nanogpt",
    "attention",
    "called-twice",
    "tied-linear",
]


def weighted(case, weights):
    """The gradient of the samples' shares of the loss, each times its weight, by plain autograd."""
    torch.manual_seed(3)
    return gradients((case.shares(case.model(*case.inputs)) * weights).sum(), case.params)


def flat(grads):
    return torch.cat([g.flatten() for g in grads.values()])


def grad_of(case):
    return {name: p.grad for name, p in case.params.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_weighted_samples(name, monkeypatch):
    if name in ("nanogpt", "conv2d"):
        monkeypatch.setattr(step, "_BLOCK_BYTES", 1000)
    case = problem(*KINDS[name]).warm().record()
    weights = torch.linspace(-1, 3, N, dtype=torch.float64)
    held = [p.grad for p in case.params.values()]
    want = weighted(case, weights)
    reweigh(case.cache, case.optimizer, weights)
    close(flat(grad_of(case)), flat(want))
    assert all(p.grad is g for p, g in zip(case.params.values(), held, strict=True))


def test_a_number_for_a_parameter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.scale = nn.Linear(D, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.linear(x) * self.scale

    case = problem(Scaled, (D,)).record()
    weights = torch.arange(N, dtype=torch.float64)
    want = weighted(case, weights)
    reweigh(case.cache, case.optimizer, weights)
    close(flat(grad_of(case)), flat(want))


def test_what_was_scaled_and_what_is_no_samples():
    case = problem(*KINDS["linear-2d"]).warm()
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    penalty = lambda: sum(p.square().sum() for p in case.model.parameters())  # noqa: E731
    case.optimizer.zero_grad()
    with case.cache:
        (case.shares(case.model(*case.inputs)).sum() + penalty()).backward()
    want = {k: g + 2 * case.params[k].detach() for k, g in weighted(case, weights).items()}
    reweigh(case.cache, case.optimizer, weights)
    close(flat(grad_of(case)), flat(want))
    case.optimizer.zero_grad()
    case.record()
    want = weighted(case, weights)
    for p in case.params.values():
        p.grad *= 0.25
    reweigh(case.cache, case.optimizer, weights)
    close(flat(grad_of(case)), 0.25 * flat(want))


def test_packed_samples():
    case = problem(*SEQUENCES["linear-3d"])
    samples = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [2] * 7, *[[3] * 7] * (N - 2)])
    loss = lambda w: (case.model(*case.inputs).square().mean(-1) * w).sum()  # noqa: E731
    with case.cache.packed(samples=samples):
        loss(torch.ones(N, 7)).backward()
    weights = torch.tensor([2.0, 0.0, 1.5, 0.5], dtype=torch.float64)
    want = gradients(loss(torch.cat([weights, torch.ones(1)])[samples]), case.params)  # padding is nobody's
    reweigh(case.cache, case.optimizer, weights)
    close(flat(grad_of(case)), flat(want))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_in_lower_precision(dtype, tolerance):
    case = problem(*SEQUENCES["nanogpt"]).record()
    weights = torch.tensor([2.0, 0.0] * N)[:N]
    want = flat(weighted(case, weights))
    low = problem(*SEQUENCES["nanogpt"])
    low.model.to(dtype)
    low.optimizer = torch.optim.AdamW(low.model.parameters())
    low.record()
    reweigh(low.cache, low.optimizer, weights)
    got = grad_of(low)
    assert {g.dtype for g in got.values()} == {dtype}
    # as far from it as plain low-precision training is, and one rounding of the gradient
    plain = copy.deepcopy(low.model)
    low.optimizer.zero_grad()
    (low.shares(plain(*low.inputs)) * weights.to(dtype)).sum().backward()
    plain_error = (flat({k: p.grad for k, p in plain.named_parameters()}).double() - want).norm()
    assert (flat(got).double() - want).norm() <= 2 * plain_error + tolerance * want.norm()


def naive(scores, products, k):
    """The sum that ``select`` names, over sets that are built up one by one."""
    c = len(scores) / k
    chosen = []
    for _ in range(k):
        worth = {}
        for i in set(range(len(scores))) - set(chosen):
            S = [*chosen, i]
            worth[i] = float(c * scores[S].sum() - c * c / 2 * products[S][:, S].sum())
        chosen.append(max(sorted(worth), key=worth.__getitem__))
    return sorted(chosen)


@pytest.mark.parametrize("k", [1, 3, 9])
def test_choosing_is_greedy_for_what_it_says(k):
    generator = torch.Generator().manual_seed(k)
    G = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(4, generator=generator, dtype=torch.float64)
    weights = choose(G @ target / 9, G @ G.T / 81, k)
    assert weights.nonzero().flatten().tolist() == naive(G @ target / 9, G @ G.T / 81, k)
    assert weights.mean() == pytest.approx(1) and set(weights.tolist()) <= {0.0, 9 / k}


@pytest.mark.parametrize("redundancy", [True, False])
@pytest.mark.parametrize("name", ["linear-2d", "nanogpt"])
def test_select_takes_the_step_of_the_chosen(name, redundancy):
    case = problem(*KINDS[name]).warm().record()
    empty, full = case.after_step(0.0), case.after_step(1.0)
    D_ = {k: torch.where(p.grad == 0, 0.0, (empty[k] - full[k]) / p.grad) for k, p in case.params.items()}
    held = {k: p.detach().clone() for k, p in case.params.items()}
    for k, p in case.params.items():
        p.data.copy_(empty[k])
    val = gradients(case.val_loss(), case.params)
    for k, p in case.params.items():
        p.data.copy_(held[k])
    each = torch.stack([flat(g) for g in gradients_one_by_one(case)])
    scores, products = each @ (flat(D_) * flat(val)), each * flat(D_) @ each.T
    case.record()
    want = naive(scores, products if redundancy else torch.zeros(N, N), N // 2)
    found = select(case.cache, case.optimizer, 0.5, redundancy=redundancy)
    close(found.scores, scores)
    assert found.weights.nonzero().flatten().tolist() == want
    # the optimizer's step is that of a batch of the chosen alone
    model, optimizer = copy.deepcopy((case.model, case.optimizer))
    optimizer.zero_grad()
    case.losses(model(*(x[want] for x in case.inputs))).mean().backward()
    optimizer.step()
    case.optimizer.step()
    for p, q in zip(case.model.parameters(), model.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-9)


def test_of_samples_that_are_alike_not_all_are_taken():
    """Six copies of one sample, and four that see something else: by scores alone the copies win."""
    torch.manual_seed(0)
    x = torch.eye(4)[[0] * 6 + [1] * 4].double()
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    cache = ag.LayerCache(model, lambda: (model(torch.eye(4).double()[:2]) - torch.tensor([[1.2], [1.0]])).square().mean())
    taken = {}
    for redundancy in (True, False):
        optimizer.zero_grad()
        with cache:
            (model(x) - 1).square().mean().backward()
        taken[redundancy] = select(cache, optimizer, 0.6, redundancy=redundancy).weights[6:].count_nonzero()
    assert taken == {True: 3, False: 0}  # half each is nearest to the target's gradient


def test_weighing_leaves_out_what_harms():
    assert weigh(torch.tensor([3.0, -1.0, 1.0, 0.0])).tolist() == [3.0, 0.0, 1.0, 0.0]
    assert weigh(torch.tensor([-3.0, -1.0])).tolist() == [1.0, 1.0]
    case = problem(*KINDS["linear-2d"]).warm().record()
    found = select(case.cache, case.optimizer, None)
    close(found.weights, weigh(found.scores))
    close(flat(grad_of(case)), flat(weighted(case, found.weights)))


def test_refuses_and_leaves_the_gradient():
    case = problem(*KINDS["linear-2d"]).warm().record()
    before = flat(grad_of(case)).clone()
    for call, message in (
        (lambda: select(case.cache, case.optimizer, 0.0), "fraction must be above 0 and at most 1, or None"),
        (lambda: reweigh(case.cache, case.optimizer, torch.ones(N + 1)), rf"weights must be \[{N}\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    case.cache.validation.val_loss = lambda: torch.stack([case.val_loss(), case.val_loss()])
    with pytest.raises(ValueError, match="val_loss must return one loss to choose by, got 2"):
        select(case.cache, case.optimizer)
    assert torch.equal(flat(grad_of(case)), before)
    reweigh(case.cache, case.optimizer, torch.linspace(0, 2, N))
    with pytest.raises(ValueError, match="edited"):  # scores of the old gradient would be another step's
        case.attribute()


def test_a_gradient_that_no_call_explains_is_not_weighed():
    case = problem(*KINDS["linear-2d"], cache_options={"fallback": False, "strict": False})
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    case.model.register_parameter("extra", extra)
    case.optimizer.add_param_group({"params": [extra]})
    with case.cache:
        (case.shares(case.model(*case.inputs)).sum() + extra.sum()).backward()
    with (
        pytest.warns(UserWarning, match="extra"),
        pytest.raises(ValueError, match="no recorded call explains the gradient of extra"),
    ):
        reweigh(case.cache, case.optimizer, torch.zeros(N))


def test_a_run_does_not_score_a_gradient_that_was_chosen():
    case = problem(*KINDS["linear-2d"]).warm()
    run = ag.InRun(case.model, case.optimizer, case.val_loss)
    run.batch(range(N))
    case.record()
    select(case.cache, case.optimizer, 0.5)
    with pytest.raises(ValueError, match="edited"):
        case.optimizer.step()
    run.close()
