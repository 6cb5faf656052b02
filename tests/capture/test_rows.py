"""Rows that are moved, selected, routed and written back: every sample's share is found again, wherever its rows went."""

import pytest
import torch
from models import D, Fn, N, problem
from oracles import close, derivative_of_losses, gradients, gradients_one_by_one, inner
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.capture.batch import Batch


def order(n):
    """A permutation that is its own only where it has to be."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(n))


def written_at(target, index, value):
    target[index] = value
    return target


def flat(h):
    return h.flatten(0, 1)


def third(h):
    """Two of three tokens."""
    return torch.arange(h.shape[0] * h.shape[1]).view(h.shape[:2]) % 3 > 0


def sorted_and_back(h):
    perm = order(len(flat(h)))
    back = torch.empty_like(perm)
    back[perm] = torch.arange(len(perm))
    return flat(h)[perm][back].view(h.shape)


def capacity(h):
    """Experts with as many slots each, some of them empty."""
    rows = flat(h)
    slots = torch.arange(4 * 12).view(4, 12)
    taken = F.pad(rows, (0, 0, 0, 1))[slots.clamp(max=len(rows))] * 2  # the last row is nobody's
    back = torch.zeros(len(rows) + 1, h.shape[-1], dtype=h.dtype)
    return back.index_add(0, slots.flatten().clamp(max=len(rows)), flat(taken))[: len(rows)].view(h.shape)


# of h [n, T, D] between two linear layers: the rows are those of a sample each, in another order
MOVED = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "roll-tokens": lambda h: flat(h).roll(3, 0),
    "permuted": lambda h: h[torch.arange(len(h)).flip(0)],
    "index-select": lambda h: h.index_select(0, torch.arange(len(h)).flip(0)),
    "gather-one": lambda h: h.gather(0, torch.zeros_like(h, dtype=torch.long)),
    "gather-rows": lambda h: flat(h).gather(0, order(len(flat(h)))[:, None].expand(-1, h.shape[-1])),
    "routing": lambda h: flat(h)[:: h.shape[1]].flip(0),
    "flipud": lambda h: h.flipud(),
    "rot90": lambda h: torch.rot90(h, 2, (0, 1)),
    "index-put": lambda h: torch.zeros_like(h).index_put((torch.arange(len(h)).flip(0),), h),
    "index-put-in-place": lambda h: torch.zeros_like(h).index_put_((torch.arange(len(h)).flip(0),), h),
    "setitem": lambda h: written_at(torch.zeros(h.shape, dtype=h.dtype), torch.arange(len(h)).flip(0), h),
    "setitem-mask": lambda h: written_at(
        torch.zeros(flat(h).shape, dtype=h.dtype), third(h).flatten(), flat(h)[third(h).flatten()]
    ),
    "fliplr": lambda h: h.transpose(0, 1).fliplr().transpose(0, 1),
    "take": lambda h: h.take(torch.arange(h.numel()).flip(0).view(h.shape)),
    "masked-scatter": lambda h: torch.zeros_like(h).masked_scatter(torch.ones_like(h, dtype=torch.bool), h),
    "take-along": lambda h: torch.take_along_dim(h, torch.zeros_like(h, dtype=torch.long), 0),
    "index-add": lambda h: torch.zeros(h.shape, dtype=h.dtype).index_add(0, torch.arange(len(h)).flip(0), h),
    "index-copy": lambda h: torch.zeros(h.shape, dtype=h.dtype).index_copy(0, torch.arange(len(h)).flip(0), h),
    "scatter-add": lambda h: torch.zeros(h.shape, dtype=h.dtype).scatter_add(
        0, torch.arange(len(h)).flip(0)[:, None, None].expand_as(h), h
    ),
    "tensor-split": lambda h: torch.cat(h.tensor_split(2, 0)[::-1], 0),
    "chunk-swapped": lambda h: torch.cat([h[1:], h[:1]]),
    "unbound": lambda h: torch.stack([*h.unbind(0)][::-1]),
    "iterated": lambda h: torch.stack(list(reversed([x for x in h]))),
    "unfolded": lambda h: h.unfold(0, len(h), 1).squeeze(0).movedim(-1, 0),
    "one-sample": lambda h: h[2].unsqueeze(0) * h[2].sum(0),
    "time-major-flat": lambda h: h.transpose(0, 1).reshape(-1, h.shape[-1]),
    "tokens-permuted": lambda h: flat(h)[order(len(flat(h)))],
    "tokens-masked": lambda h: h[third(h)],
    "tokens-repeated": lambda h: flat(h)[order(len(flat(h)))].repeat_interleave(3, 0),
    "summed-by-sample": lambda h: (
        flat(h)[order(len(flat(h)))]
        .new_zeros(len(h), h.shape[-1])
        .index_add(0, order(len(flat(h))) // h.shape[1], flat(h)[order(len(flat(h)))])
    ),
    "joined-and-cut": lambda h: flat(h)[order(len(flat(h)) // 5 * 5)].view(-1, 5 * D)[:, :D],
    "repeated-over-experts": lambda h: flat(h)[order(len(flat(h)))].repeat(3, 1, 1).view(-1, D),
    "padded": lambda h: F.pad(flat(h), (0, 0, 0, 3))[order(len(flat(h)) + 3)],
    "sorted-and-back": sorted_and_back,
    "capacity": capacity,
}


def owners(name, n, T):
    """``[rows]``: the sample of each row, which the same moves of the samples' numbers show; 0 where it is padding."""
    numbers = torch.arange(1, n + 1).double().view(n, 1, 1).expand(n, T, D).clone()
    if name == "one-sample":
        return torch.tensor([3])
    shown = MOVED[name](numbers)
    if name == "capacity":
        shown = shown / 2
    if name == "summed-by-sample":
        shown = shown / T
    return shown.flatten(1).amax(1).long()


@pytest.mark.parametrize("T", [N, 7], ids=["T=n", "T=7"])
@pytest.mark.parametrize("name", MOVED)
def test_rows_are_followed(name, T):
    """The loss of a row is its sample's: its gradient, by a backward pass of that loss alone, goes to that one."""
    move = MOVED[name]
    model = lambda: Fn(lambda s, x: s.b(torch.tanh(move(s.a(x)))), a=nn.Linear(D, D), b=nn.Linear(D, 2))  # noqa: E731
    case = problem(model, "x", T=T).warm().record()
    P = case.direction()
    shares, want = case.shares(case.model(*case.inputs)), torch.zeros(N, dtype=torch.float64)
    for share, owner in zip(shares, owners(name, N, T).tolist(), strict=True):
        if owner:
            want[owner - 1] += inner(P, gradients(share, case.params, retain_graph=True))
    if name in ("padded", "setitem-mask"):  # the bias has a part of its gradient from padding
        case.cache.coverage.strict = False
        with pytest.warns(UserWarning, match="the scores add up to"):
            found = case.attribute()
    else:
        found = case.attribute()
    close(found, want)


BLIND = "tokens-permuted", "sorted-and-back", "capacity", "tokens-repeated", "time-major-flat", "scatter-add", "chunk-swapped"


@pytest.mark.parametrize("name", BLIND)
def test_rows_are_followed_without_looking(name, monkeypatch):
    """As on a device that looking would have to wait for."""
    monkeypatch.setattr(Batch, "look", False)
    test_rows_are_followed(name, 7)


def test_rows_that_meet_unseen_leave_no_number(monkeypatch):
    """Where nobody may look, rows of two samples in one place show in the scores."""
    monkeypatch.setattr(Batch, "look", False)
    mix = lambda h: torch.zeros(2, D).double().index_add(0, torch.arange(len(flat(h))) % 2, flat(h))  # noqa: E731
    model = lambda: Fn(lambda s, x: s.b(mix(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2))  # noqa: E731
    case = problem(model, "x", T=7, cache_options={"fallback": False})
    case.optimizer.zero_grad()
    with case.cache:
        case.model(*case.inputs).square().sum().backward()
    with pytest.raises(RuntimeError, match="the scores add up to"):
        case.attribute()


# where rows of different samples meet
MIXED = {
    "added-to-one-place": lambda h: torch.zeros(2, D).double().index_add(0, torch.arange(len(flat(h))) % 2, flat(h)),
    "written-to-one-place": lambda h: written_at(torch.zeros(2, D).double(), torch.arange(len(flat(h))) % 2, flat(h)),
    "scattered": lambda h: (
        torch.zeros(2, D).double().scatter_add(0, (torch.arange(len(flat(h))) % 2)[:, None].expand(-1, D), flat(h))
    ),
    "sum-of-pairs": lambda h: flat(h)[order(len(flat(h)))][: 2 * N].view(N, 2, D).sum(1),
    "permuted-and-added": lambda h: flat(h)[order(len(flat(h)))] + flat(h),
    "mean-of-permuted": lambda h: flat(h)[order(len(flat(h)))].mean(0, keepdim=True),
    "attention-of-rows": lambda h: F.scaled_dot_product_attention(*[flat(h)[order(len(flat(h)))][None]] * 3)[0],
    "joined": lambda h: flat(h)[order(len(flat(h)) // 5 * 5)].view(-1, 5 * D)[:, 3 : 3 + D],
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_meet_are_named(name):
    model = lambda: Fn(lambda s, x: s.b(MIXED[name](s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2))  # noqa: E731
    case = problem(model, "x", T=7, cache_options={"fallback": False})
    case.optimizer.zero_grad()
    with case.cache:
        case.model(*case.inputs).square().sum().backward()
    with pytest.raises(RuntimeError, match=r"not attributed: b.weight, b.bias; the scores cover"):
        case.attribute()


class Experts(nn.Module):
    """Tokens go to the experts that a router picks, each expert a module, in a loop; a shared one takes all."""

    def __init__(self):
        super().__init__()
        self.inner, self.router = nn.Linear(D, D), nn.Linear(D, 4)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, D)) for _ in range(4)]
        )
        self.shared, self.table, self.head = nn.Linear(D, D), nn.Embedding(4, D), nn.Linear(D, 2)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            row, place = torch.where(chosen == e)
            if len(row):
                out.index_add_(0, row, (expert(rows[row]) + self.table(chosen[row, place])) * weights[row, place, None])
        return self.head(x + (out + self.shared(rows)).view(x.shape))


def experts(T=7):
    return problem(Experts, "x", T=T)


def test_experts_in_a_loop():
    case = experts().warm().record()
    P = case.direction()
    want = torch.stack([inner(P, g) for g in gradients_one_by_one(case)])
    close(case.attribute(), want)
    close(derivative_of_losses(case, P), want)
    close(case.attribute(per_token=True).sum(1), want)


def balance(probabilities, chosen):
    """Switch's loss: each expert's share of the tokens times its mean probability, over the whole batch."""
    return 4 * (F.one_hot(chosen, 4).double().mean((0, 1)) * probabilities.mean(0)).sum()


def test_a_loss_that_balances_experts():
    """It compares samples: of its gradient each has what comes through the router's rows that are its own."""
    case = experts().warm()
    router, seen = case.model.router, []

    def balanced():
        """The samples' losses, and what balancing adds."""
        seen.clear()
        handle = router.register_forward_hook(lambda module, args, logits: seen.append(logits))
        shares = case.shares(case.model(*case.inputs))
        handle.remove()
        probabilities = seen[0].softmax(-1)
        return shares, balance(probabilities, probabilities.topk(2)[1])

    case.optimizer.zero_grad()
    with case.cache:
        shares, added = balanced()
        (shares.sum() + added).backward()
    P = case.direction()
    shares, added = balanced()
    slope = torch.autograd.grad(added, seen[0], retain_graph=True)[0]
    shares = shares + (slope * seen[0]).view(N, -1).sum(1)
    want = torch.stack([inner(P, gradients(share, case.params, retain_graph=True)) for share in shares])
    close(case.attribute(), want)


def test_tokens_of_experts():
    """A token's part is that of its own losses, where tokens do not meet."""
    case = experts()
    case.losses = lambda out: (out - 0.3).square().mean(2).mean(1)
    case.warm().record()
    P = case.direction()
    per_token = lambda out: (out - 0.3).square().mean(2) / out.shape[1] / N  # noqa: E731
    shares = per_token(case.model(*case.inputs))
    want = [inner(P, gradients(share, case.params, retain_graph=True)) for share in shares.flatten()]
    close(case.attribute(per_token=True), torch.stack(want).view(N, 7))


def products(case, preconditioned):
    """``[n, n]``: < D g_i , g_j > from single gradients, D the secant's slope of each weight's step."""
    found = gradients_one_by_one(case)
    total = torch.zeros(N, N).double()
    empty, full = case.after_step(0.0), case.after_step(1.0)
    for k, p in case.params.items():
        slope = (empty[k] - full[k]) / torch.where(p.grad == 0, 1.0, p.grad) if preconditioned else torch.ones_like(p)
        G = torch.stack([g[k].flatten() if g[k] is not None else torch.zeros(p.numel()).double() for g in found])
        total += (G * slope.flatten()) @ G.T
    return total


def test_pairs_of_experts():
    case = experts().warm().record()
    close(ag.gram(case.cache, case.optimizer, preconditioner="exact"), products(case, True), 1e-8)
    close(ag.gram(case.cache, case.optimizer, preconditioner=None), products(case, False))
    assert ag.gram(case.cache, case.optimizer, preconditioner="factored").isfinite().all()


@pytest.mark.parametrize("way", ["midpoint", "lookahead"])
def test_packed_samples_among_experts(way):
    """Samples packed in rows get their tokens' scores, wherever the tokens were sent."""
    offsets = torch.tensor([0, 3, 4, 11, 20, 35])
    case = experts().warm(11)
    case.optimizer.zero_grad()
    loss = lambda: case.shares(case.model(*case.inputs)).sum()  # noqa: E731
    with ag.InRun(case.model, case.optimizer, case.val_loss, way, strict=True) as run:
        run.batch(range(5), offsets)
        with case.cache:
            loss().backward()
        at = "midpoint" if way == "midpoint" else None
        per_token = None if at is None else case.attribute(per_token=True)
        case.optimizer.step()
        run.flush()
        found, record = torch.from_numpy(run.scores().total), run.steps[-1]
    close(found.sum(), torch.tensor(record.total, dtype=torch.float64).squeeze())
    if per_token is not None:
        close(found, torch.stack([x.sum() for x in per_token.flatten().split(offsets.diff().tolist())]))
