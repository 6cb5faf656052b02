"""Parameters that no layer call explains: scored by the model's derivative along ``P``, where its outputs keep samples apart."""

import warnings

import pytest
import torch
from models import D, Fn, N, inputs, normal
from oracles import Problem, close, gradients_loss_by_loss, inner
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

LOST = {
    "through-numpy": lambda s, x: s.b(Twice.apply(s.a(x)) + x.cumsum(0) * 0),
    "over-the-batch": lambda s, x: s.b(torch.tanh(s.a(x)) - s.a(x).mean(0)),
    "partly": lambda s, x: s.a(torch.tanh(s.a(x)).cumsum(0)) @ s.b.weight.T,
    "table": lambda s, x: s.b(torch.cov(s.a(x).flatten(1)) @ s.a(x).flatten(1)[:, :D])[:, None],
}


class Twice(torch.autograd.Function):
    """Of unknown doings, with a forward mode."""

    @staticmethod
    def forward(x):
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad * 2

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * 2


def problem(name, **options):
    torch.manual_seed(0)
    model = Fn(LOST[name], a=nn.Linear(D, D), b=nn.Linear(D, 2), unused=normal(3)).double()
    return Problem(model, (inputs("x", N, 7, 1),), (inputs("x", 4, 7, 2),), cache_options=options).warm()


@pytest.mark.parametrize("name", LOST)
def test_scores_are_those_of_single_losses(name):
    """Where samples meet, each loss' own gradient; the rest comes from layer calls as ever."""
    case = problem(name).record()
    P = case.direction()
    with pytest.warns(UserWarning, match=r"lost by the layer calls: .*are scored by a forward-mode pass"):
        found = case.attribute()
    close(found.sum(), inner(P, {k: p.grad for k, p in case.params.items()}))
    if name in ("through-numpy", "partly"):  # where no other layer's samples meet
        close(found, torch.stack([inner(P, g) for g in gradients_loss_by_loss(case)]))


@pytest.mark.parametrize("way", ["midpoint", "lookahead", "window"])
def test_the_books_tell_what_it_costs(way):
    """The share of the parameters, and a pass to each of two targets and micro-batches; nothing where layer calls explain all."""
    for forward, share in ((LOST["over-the-batch"], None), (lambda s, x: s.b(torch.tanh(s.a(x))), 0.0)):
        model = Fn(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        val = lambda model=model: model(inputs("x", 4, 7, 2)).square().mean((0, 1))  # noqa: E731
        loss = lambda x, model=model: model(x).square().sum() / N  # noqa: E731
        windows = {"window": 1, "ahead": 0, "train_loss": loss, "feedback": "none"} if way == "window" else {}
        with warnings.catch_warnings(), ag.InRun(model, optimizer, val, way, **windows) as run:
            warnings.simplefilter("ignore")
            for _ in range(11):
                for seed in (1, 3):
                    x = inputs("x", N, 7, seed)
                    run.batch(range(N), inputs=x)
                    loss(x).backward()
                optimizer.step()
                optimizer.zero_grad()
            run.flush()
            record = run.steps[-1]
        lost = sum(p.numel() for p in model.b.parameters()) / sum(p.numel() for p in model.parameters())
        assert (record.by_passes, record.passes) == ((lost, 4) if share is None else (0.0, 0))
        assert record.coverage == 1


def test_left_out_on_demand():
    with pytest.raises(RuntimeError, match=r"not attributed: b.weight, b.bias"):
        problem("over-the-batch", fallback=False).record().attribute()


@pytest.mark.parametrize("way", ["midpoint", "gauss", "lookahead", "window"])
@pytest.mark.parametrize("parts", [1, 2])
def test_in_a_run(way, parts):
    """The scores add up to the step, of which nothing is left out; accumulated over micro-batches, too."""
    case = problem("over-the-batch").warm(12)
    loss = lambda inputs: case.shares(case.model(*inputs)).sum()  # noqa: E731
    windows = {"window": 1, "ahead": 0, "train_loss": loss, "feedback": "none"} if way == "window" else {}
    case.optimizer.zero_grad()
    with (
        pytest.warns(UserWarning, match="lost by the layer calls"),
        ag.InRun(case.model, case.optimizer, case.val_loss, way, strict=True, **windows) as run,
    ):
        for step in range(3):
            for k in range(parts):
                x = case.inputs[0] + step + k
                run.batch([f"{step}.{k}.{i}" for i in range(N)], inputs=(x,))
                loss((x,)).backward()
            case.optimizer.step()
            case.optimizer.zero_grad()
            run.flush()
            record = run.steps[-1]
            assert record.coverage == 1
            close(torch.tensor(record.score_sum).double(), torch.tensor(record.total).double(), 1e-9)


class Loss(nn.Module):
    """Returns its loss, as models of transformers do that are given labels."""

    def __init__(self):
        super().__init__()
        self.a, self.lm_head = nn.Linear(D, D), nn.Linear(D, 3)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, x, y):
        h = torch.tanh(self.a(x))
        return F.cross_entropy(self.lm_head(h - h.mean(0)).flatten(0, 1), y.flatten(), reduction="sum")


def test_a_model_that_returns_its_loss():
    torch.manual_seed(0)
    model, x, y = Loss().double(), inputs("x", N, 7, 1).double(), torch.randint(0, 3, (N, 7))
    val = lambda: model(x.flip(0) + 1, y)  # noqa: E731
    cache, optimizer = ag.LayerCache(model, val, strict=True), torch.optim.AdamW(model.parameters())
    with cache:
        model(x, y).backward()
    case = Problem(model, (x, y), (x.flip(0) + 1, y), optimizer=optimizer)
    case.val_loss = val
    P = case.direction()
    with pytest.warns(UserWarning, match="lost by the layer calls"):
        found = ag.attribute(cache, optimizer)
    h = torch.tanh(model.a(x))
    logits = model.lm_head(h - h.mean(0))
    rows = [F.cross_entropy(logits[i], y[i], reduction="sum") for i in range(N)]
    # the first layer's samples are told by their rows
    pull = torch.autograd.grad(sum(rows), h, retain_graph=True)[0]
    want = []
    for i, row in enumerate(rows):
        own = torch.autograd.grad(row, list(model.lm_head.parameters()), retain_graph=True)
        through = torch.autograd.grad(h[i], list(model.a.parameters()), pull[i], retain_graph=True)
        names = ("lm_head.weight", "lm_head.bias", "a.weight", "a.bias")
        want.append(inner(P, dict(zip(names, (*own, *through), strict=True))))
    close(found, torch.stack(want))


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_without_a_forward_mode():
    torch.manual_seed(0)
    model = Fn(lambda s, x: s.b(NoForwardMode.apply(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2)).double()
    case = Problem(model, (inputs("x", N, 7, 1),), (inputs("x", 4, 7, 2),)).warm().record()
    with pytest.raises(RuntimeError, match=r"not attributed: b.weight, b.bias; the scores cover"):
        case.attribute()
    case.cache.coverage.strict = False
    with pytest.warns(UserWarning, match=r"not attributed: b.weight"):
        assert case.record().attribute().isfinite().all()
