"""What attribution leaves behind: nothing. And what it makes of half precision."""

import copy

import pytest
import torch
from models import SEQUENCES, VOCABULARY, D, Fn, N, inputs, normal, problem
from oracles import Problem, losses
from snapshots import everything, residue, same
from torch import nn
from torch.nn.utils import parametrizations

import adam_ghost as ag
from adam_ghost.layer_cache import open_step
from adam_ghost.step.direction import find_direction


def noisy():
    """Dropout of several kinds, and a layer with a state."""
    return nn.Sequential(
        nn.Linear(D, D),
        nn.Dropout(0.3),
        nn.TransformerEncoderLayer(D, 2, 8, dropout=0.2, batch_first=True),
        parametrizations.spectral_norm(nn.Linear(D, D)),
        nn.LSTM(D, D, 2, dropout=0.2, batch_first=True),
        Fn(lambda s, x: s.a(x[0]) + torch.nn.functional.dropout(s.p, 0.3, s.training), a=nn.Linear(D, 2), p=normal(2)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_training_is_the_same_to_the_bit(dtype):
    def train(attributed):
        torch.manual_seed(0)
        model = noisy().to(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x = inputs("x", N, 4, 1).to(dtype)
        # a validation loss that leaves its mark wherever it can: dropout on, power iterations, modes, gradients of its own
        cache = ag.LayerCache(model, lambda: losses(model.train()(x + torch.randn_like(x))).sum(), strict=True)
        states = []
        for _ in range(3):
            optimizer.zero_grad()
            model[1].eval()
            if attributed:
                with cache:
                    out = model(x)
                    losses(out).mean().backward()
            else:
                out = model(x)
                losses(out).mean().backward()
            states.append(everything(model, optimizer) | {"out": out.detach()})
            if attributed:
                before = everything(model, optimizer)
                ag.attribute(cache, optimizer)
                ag.attribute(cache, optimizer, rule="frozen", at="current")
                ag.gram(cache, optimizer)
                ag.exact_shapley(cache, optimizer, permutations=1)
                same(everything(model, optimizer), before)
            optimizer.step()
            states.append(everything(model, optimizer))
        return states

    for plain, attributed in zip(train(False), train(True), strict=True):
        same(plain, attributed)


def test_max_norm_embedding_comes_back():
    """Its validation pass writes to the weights, at whichever weights it runs."""
    case = problem(*SEQUENCES["embedding-max-norm"]).warm().record()
    case.val_inputs = (torch.arange(VOCABULARY)[None],)
    for at in ("current", "lookahead", "midpoint"):
        case.model.embedding.weight.data[3] *= 1.5  # a row that training did not look up may be of any norm
        before = everything(case.model, case.optimizer)
        case.attribute(at=at)
        same(everything(case.model, case.optimizer), before)


def test_nothing_stays_on_the_model():
    case = problem(*SEQUENCES["relative-bias"])
    before = residue(case.model)
    case.warm().record()
    case.attribute()
    assert residue(case.model) == before


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward", "val_loss"])
def test_after_an_exception(where):
    def explode(*_):
        raise Boom

    case = problem(*SEQUENCES["relative-bias"]).warm()
    before = residue(case.model)
    if where == "val_loss":
        case.record()
        held = everything(case.model, case.optimizer)
        good, case.cache.validation.val_loss = case.cache.validation.val_loss, lambda: explode(case.model.eval()(*case.val_inputs))
        with pytest.raises(Boom):
            case.attribute()
        same(everything(case.model, case.optimizer), held)
        case.cache.validation.val_loss = good
    else:
        with pytest.raises(Boom), case.cache:
            handle = case.model.out.register_forward_hook(explode) if where == "forward" else None
            try:
                out = case.model(*case.inputs)
                out.register_hook(explode)
                out.sum().backward()
            finally:
                if handle:
                    handle.remove()
        assert residue(case.model) == before
        with pytest.raises(ValueError, match="nothing was recorded"):
            case.attribute()
    assert residue(case.model) == before
    torch.testing.assert_close(case.record().attribute(), problem(*SEQUENCES["relative-bias"]).warm().record().attribute())


def test_random_validation_batches():
    """New ones at every step, the same for a game and the scores it judges, and none of training's numbers."""
    case = problem(*SEQUENCES["nanogpt"]).warm()
    drawn = []

    def val_loss():
        drawn.append(torch.randint(0, VOCABULARY, (4, 7)))
        return losses(case.model(drawn[-1])).sum()

    case.cache.validation.val_loss = val_loss
    torch.manual_seed(5)
    state = torch.get_rng_state()
    case.record(seed=5)
    ag.exact_shapley(case.cache, case.optimizer, permutations=1)
    played = len(drawn)
    for _ in range(3):
        case.attribute()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, drawn[0]) for x in drawn[: played + 1])
    later = drawn[played:]
    assert len({tuple(x.flatten().tolist()) for x in later}) == 3


def test_scores_twice_are_the_same_to_the_bit():
    case = problem(*SEQUENCES["relative-bias"]).warm().record()
    assert torch.equal(case.attribute(), case.attribute())


class Mixed(nn.Module):
    """Half-precision inside, float32 around it."""

    def __init__(self, dtype):
        super().__init__()
        self.first, self.low = nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)).to(dtype)
        self.norm, self.scale = nn.RMSNorm(D), nn.Parameter(normal(D).to(dtype))
        self.last, self.dtype = nn.Linear(D, 2), dtype

    def forward(self, x):
        x = torch.tanh(self.first(x.to(self.first.weight.dtype))).to(self.dtype)
        x = self.low(x) * self.scale
        return self.last(self.norm(x.to(self.first.weight.dtype)))


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_half_precision(how):
    """No further from float64 than per-sample autograd in the same low precision, up to rounding."""
    dtype = torch.float32 if how == "autocast" else getattr(torch, how)
    torch.manual_seed(0)
    model = Mixed(dtype)
    x = inputs("x", N, 7, 1).float()
    low = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")

    def forward(m, x):
        with low:
            return losses(m(x).to(torch.float64 if m.last.weight.dtype == torch.float64 else torch.float32))

    case = Problem(model, (x,), (inputs("x", 4, 7, 2).float(),), cache_options={"strict": True})
    case.cache.validation.val_loss = lambda: forward(model, case.val_inputs[0]).sum()
    for step in range(2):
        case.optimizer.zero_grad()
        with case.cache:
            (forward(model, x).sum() / N).backward()
        if step == 0:
            case.optimizer.step()
    scores = case.attribute()
    assert scores.dtype == torch.float32 and scores.isfinite().all()

    step = open_step(case.cache, case.optimizer)
    P = find_direction(step, case.cache.validation, "secant", "midpoint").P
    exact = copy.deepcopy(model).double()
    exact.dtype = torch.float64

    def by_sample(m, x, forward):
        found = []
        for i in range(N):
            grads = torch.autograd.grad(forward(m, x[i : i + 1]).sum() / N, list(m.parameters()))
            pairs = zip(P, grads, strict=True)
            found.append(sum((P[name][0].double() * g.double()).sum() for name, g in pairs))
        return torch.stack(found)

    want = by_sample(exact, x.double(), lambda m, x: losses(m(x)))
    eager = by_sample(model, x, forward)
    eps = torch.finfo(torch.bfloat16 if how == "autocast" else dtype).eps
    assert (scores - want).norm() <= (eager - want).norm() + (7 * D) ** 0.5 * eps * want.norm()
    assert (scores - want).norm() <= 0.1 * want.norm()


def test_mixed_widths():
    """float32 and float64 parameters in one model."""
    model = Fn(lambda s, x: s.b(s.a(x.float()).double()), a=nn.Linear(D, D), b=nn.Linear(D, 2).double())
    case = Problem(model, (inputs("x", N, 3, 1),), (inputs("x", 4, 3, 2),)).warm().record()
    assert case.attribute().isfinite().all()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert case.attribute().isfinite().all()


class Counting(nn.Linear):
    """Keeps books in plain attributes."""

    def __init__(self):
        super().__init__(3, 2)
        self.passes, self.seen = 0, []

    def forward(self, x):
        self.passes += 1
        self.seen.append(len(x))
        self.last = x
        return super().forward(x)


def test_a_validation_pass_leaves_no_trace_in_plain_attributes():
    model = Counting()
    optimizer = torch.optim.AdamW(model.parameters())
    cache = ag.LayerCache(model, lambda: model(torch.ones(2, 3)).sum())
    with cache:
        model(torch.randn(4, 3)).sum().backward()
    passes, seen, last = model.passes, model.seen, model.last
    del model.last
    ag.attribute(cache, optimizer)
    assert (model.passes, model.seen) == (passes, [4]) and model.seen is seen
    assert not hasattr(model, "last") and len(last) == 4
