"""Steps that take a learned route: the same scores to the bit as followed ones, and nothing silently wrong where they leave it."""

import pytest
import torch
from models import ONE, SEQUENCES, VOCABULARY, D, Fn, inputs, problem
from torch import nn

import adam_ghost as ag
from adam_ghost.capture import learned, walk
from adam_ghost.capture.recorder import Recorder
from adam_ghost.demo.model import GPT
from adam_ghost.scores.contract import score_recordings


def by_keyword():
    return Fn(lambda s, x: s.b(input=s.a(input=x)), a=nn.Linear(D, D), b=nn.Linear(D, 2))


MODELS = {**ONE, **SEQUENCES, "gpt": (lambda: GPT(VOCABULARY, 9, layers=2, width=D, heads=2), "ids")}
MODELS["by-keyword"] = by_keyword, "x"


def written_to_in_place():
    """What ``a`` returns is a view of what its product made; ``b``'s is written to by nobody."""
    return Fn(lambda s, x: s.c(s.b(s.a(x).relu_())), a=nn.Linear(D, D), b=nn.Linear(D, D), c=nn.Linear(D, 2))


MODELS["in-place"] = written_to_in_place, "x"
SIZES = [(5, 7), (5, 7), (5, 7), (3, 7), (5, 4), (5, 7), (1, 7), (7, 7), (5, 7)]  # samples, tokens
ROUTED = {
    "gpt",
    "linear-2d",
    "linear-3d",
    "layernorm",
    "rmsnorm",
    "conv1d",
    "embedding",
    "tied-modules",
    "by-keyword",
    "in-place",
}  # at least


def scores_of(name, monkeypatch, agreeing):
    monkeypatch.setattr(learned, "AGREEING", agreeing)
    build, shape = MODELS[name]
    model = problem(build, shape).model
    cache = ag.LayerCache(model)
    generator = torch.Generator().manual_seed(3)
    P = {k: torch.randn(2, *p.shape, generator=generator, dtype=p.dtype) for k, p in model.named_parameters() if p.requires_grad}
    found = []
    for k, (n, T) in enumerate(SIZES):
        torch.manual_seed(k)
        model.zero_grad()
        try:
            with cache:
                out = model(inputs(shape, n, T, k))
                (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        except RuntimeError as error:  # a model of one size
            found.append(str(error)[:20])
            continue
        assert not cache.recorded.deviation
        found.append((score_recordings([cache.recorded], P), cache.recorded.covered()) if cache.recorded.calls else None)
    return found, cache._recorder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_same_scores_to_the_bit(name, monkeypatch):
    (got, recorder), (want, _) = (scores_of(name, monkeypatch, agreeing) for agreeing in (learned.AGREEING, 10**9))
    for a, b in zip(got, want, strict=True):
        if isinstance(b, tuple):
            assert torch.equal(a[0], b[0]) and a[1] == b[1]
        else:
            assert a == b
    if name in ROUTED:
        assert any(recorder._routes.values()), "no step took a route"


class Fickle(nn.Module):
    """Does what ``mood`` says between its layers."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.other = nn.Linear(D, D)
        self.last = nn.Linear(D, 2)
        self.mood = "plain"

    def forward(self, x):
        x = self.block(x)
        if self.mood == "writes in place":
            x.relu_()
        if self.mood == "flips samples":
            x = x.flip(0)
        if self.mood == "flips features":
            x = x.flip(1)
        if self.mood == "skips a layer":
            return x
        if self.mood == "another layer":
            x = self.other(x)
        if self.mood == "twice":
            x = self.last(x)[..., :1] + x
        return self.last(x.roll(1, 0 if self.mood == "rolls samples" else 1))


MOODS = ("writes in place", "flips samples", "flips features", "skips a layer", "another layer", "twice", "rolls samples")


def step(model, cache, n=4):
    model.zero_grad()
    with cache:
        model(torch.randn(n, D)).square().sum().backward()


@pytest.mark.parametrize("mood", MOODS)
def test_a_step_that_leaves_its_route_is_named_and_the_next_is_followed(mood):
    model = Fickle()
    optimizer = torch.optim.AdamW(model.parameters())
    cache = ag.LayerCache(model, lambda: model(torch.ones(2, D)).sum())
    for _ in range(4):
        step(model, cache)
    assert any(cache._recorder._routes.values())
    model.mood = mood
    step(model, cache)
    with pytest.raises(ValueError, match="unlike in earlier steps"):
        ag.attribute(cache, optimizer)
    for model.mood in ("plain", mood, "plain"):
        torch.manual_seed(1)
        step(model, cache)
        assert not cache.recorded.deviation
        got = cache.recorded
        torch.manual_seed(1)
        fresh = ag.LayerCache(model)
        step(model, fresh)
        P = {k: torch.randn(1, *p.shape) for k, p in model.named_parameters()}
        assert torch.equal(score_recordings([got], P), score_recordings([fresh.recorded], P))
        assert got.unattributed == fresh.recorded.unattributed


class Ordered(nn.Module):
    """Runs a block on the samples in another order than they came in."""

    def __init__(self, order):
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.order = order

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(self.order(h, x, self.block) + h)


def by_index(h, x, block):
    order = x[:, 0].argsort()
    return block(h[order])[order.argsort()]


def by_index_of_a_dimension(h, x, block):
    order = x[:, 0].argsort()
    return block(h.index_select(0, order)).index_select(0, order.argsort())


def by_writing(h, x, block):
    order = x[:, 0].argsort()
    there = torch.zeros_like(h)
    there[order.argsort()] = h
    return block(there)[order.argsort()]


def by_parts(h, x, block):
    turned = slice(None, None, 1 if x[0, 0] < x[-1, 0] else -1)
    return torch.cat(block(torch.cat(h.chunk(2)[turned])).chunk(2)[turned])


def by_a_cut(h, x, block):
    cut = 0 if x[0, 0] < x[-1, 0] else 2
    y = block(torch.cat([h[cut:], h[:cut]]))
    return torch.cat([y[len(y) - cut :], y[: len(y) - cut]])


@pytest.mark.parametrize("order", [by_index, by_index_of_a_dimension, by_writing, by_parts, by_a_cut])
def test_an_order_that_values_decide_is_not_learned(order):
    """All samples are as long as each other at first, say, and are sorted by length later: the graph looks the same."""
    torch.manual_seed(0)
    model = Ordered(order).double()
    cache = ag.LayerCache(model)
    P = {k: torch.randn(1, *p.shape, dtype=p.dtype) for k, p in model.named_parameters()}
    for k in range(5):
        x = torch.randn(4, D, dtype=torch.float64)
        x = x[x[:, 0].argsort(descending=k == 4)]
        model.zero_grad()
        with cache:
            model(x).square().sum().backward()
    assert not cache.recorded.deviation
    got = score_recordings([cache.recorded], P)[:, 0]
    for score, row in zip(got, x, strict=True):
        alone = torch.autograd.grad(Ordered.forward(model, row[None]).square().sum(), list(model.parameters()))
        want = sum((P[k][0] * g).sum() for k, g in zip(P, alone, strict=True))
        torch.testing.assert_close(score, want)


def less_the_mean_of_a_quarter(h):
    quarters = h.view(4, len(h) // 4, -1)
    return (quarters - quarters.mean(1, keepdim=True) / 2).view_as(h)


def with_the_mean_of_eight_tokens(h):
    blocks = torch.reshape(input=h, shape=(-1, 8, D))
    return (blocks + blocks.mean(1, keepdim=True)).view_as(h)


@pytest.mark.parametrize(
    ("mix", "apart", "mixed"),
    [(less_the_mean_of_a_quarter, (4, D), (8, D)), (with_the_mean_of_eight_tokens, (6, 8, D), (6, 4, D))],
)
def test_sizes_by_which_a_reshape_mixes_samples_are_noticed(mix, apart, mixed):
    """More samples than in the steps that were followed, or fewer tokens: the same functions, the same graph."""
    model = Fn(lambda s, x: s.b(mix(s.a(x).tanh())), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    cache = ag.LayerCache(model)
    for shape, deviates in ((apart, False),) * 4 + ((mixed, True), (mixed, False)):
        with cache:
            model(torch.randn(shape)).square().sum().backward()
        assert ("samples were reshaped into each other" in cache.recorded.deviation) == deviates
    assert cache.recorded.covered() == {"a.weight", "a.bias"} and "b.weight" in cache.recorded.unattributed


class Output:
    """Of a model whose output is no tensor, and no container of torch's."""

    def __init__(self, rows):
        self.rows = rows


def wrapped(model, h):
    return Output(model.last(h))


def left_aside(model, h):
    model.aside = Output(model.last(h))
    return h.detach()


@pytest.mark.parametrize("way", [wrapped, left_aside])
def test_what_no_graph_shows_is_not_learned(way):
    torch.manual_seed(0)
    model = Fickle().double()
    model.forward = lambda x: way(model, model.block(x).flip(0) if model.mood == "flips samples" else model.block(x))
    cache = ag.LayerCache(model)
    for model.mood in ("plain",) * 4 + ("flips samples",):
        model.zero_grad()
        x = torch.randn(4, D, dtype=torch.float64)
        with cache:
            found = model(x)
            rows = (found if way is wrapped else model.aside).rows
            rows.square().sum().backward()
    assert not cache.recorded.deviation
    used = {k: p for k, p in model.named_parameters() if p.grad is not None}
    P = {k: torch.randn(1, *p.shape, dtype=p.dtype) for k, p in used.items()}
    for score, row in zip(score_recordings([cache.recorded], P)[:, 0], x, strict=True):
        alone = torch.autograd.grad(model.last(model.block(row[None])).square().sum(), list(used.values()))
        torch.testing.assert_close(score, sum((P[k][0] * g).sum() for k, g in zip(P, alone, strict=True)))


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_a_batch_of_nothing_takes_no_route(schedule):
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with ag.InRun(model, optimizer, lambda: model(torch.ones(2, D)).sum(), schedule, strict=True) as run:
        for sizes in ((4,),) * 14 + ((4, 0), (0, 4), (4,)):
            optimizer.zero_grad()
            for n in sizes:
                run.batch(range(n))
                model(torch.randn(n, D)).square().sum().backward()
            optimizer.step()
    assert [s.samples for s in run.steps] == [4] * 17


def test_a_part_that_is_given_the_samples_in_another_order_is_noticed():
    sorting = Fn(lambda s, h, x: h[x[:, 0].argsort()])
    model = Ordered(lambda h, x, block: block(sorting(h, x)))
    model.sorting = sorting
    cache = ag.LayerCache(model)
    for _ in range(4):
        with cache:
            model(torch.randn(4, D).sort(0).values).square().sum().backward()
    assert any(cache._recorder._routes.values())
    with cache:
        model(torch.randn(4, D).sort(0, descending=True).values).square().sum().backward()
    assert "was given the samples in another way" in cache.recorded.deviation


def test_a_replaced_layer_is_noticed():
    model = Fickle()
    cache = ag.LayerCache(model)
    for _ in range(4):
        step(model, cache)
    model.block[0] = nn.Linear(D, D)
    step(model, cache)
    assert "unlike in earlier steps" in cache.recorded.deviation
    step(model, cache)
    assert not cache.recorded.deviation and "block.0.weight" in cache.recorded.covered()


@pytest.mark.filterwarnings("ignore:adam_ghost. step")
def test_a_run_leaves_out_that_one_step():
    model = Fickle()
    optimizer = torch.optim.AdamW(model.parameters())
    with ag.InRun(model, optimizer, lambda: model(torch.ones(2, D)).sum()) as run:
        for k in range(8):
            model.mood = "flips samples" if k == 5 else "plain"
            run.batch(range(4))
            model(torch.randn(4, D)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [s.skipped for s in run.steps] == [k == 5 for k in range(8)]


def test_copies_of_a_model_on_a_route_carry_nothing():
    import copy

    model = Fickle()
    cache = ag.LayerCache(model)
    for _ in range(4):
        step(model, cache)
    bare = copy.deepcopy(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*bare.modules(), *model.modules()))


@pytest.mark.parametrize("name", ["nanogpt", "tied-modules"])
def test_walks_are_those_of_torch(name):
    model = Fn(lambda s, x: x, a=MODELS[name][0](), b=nn.ModuleList([nn.Linear(1, 1)]))
    model.c = model.b[0]  # found twice
    assert walk.modules(model) == list(model.modules())
    assert list(walk.named_parameters(model).items()) == list(model.named_parameters())


def put_in(model):
    model.more = nn.Linear(2, 2)


def exchange_a_layer(model):
    model.block[0] = nn.Linear(D, D)


def exchange_a_parameter(model):
    model.last.bias = nn.Parameter(torch.zeros(2))


def take_out(model):
    del model.other


def rename(model):
    model.renamed = model._modules.pop("last")


@pytest.mark.parametrize("change", [put_in, exchange_a_layer, exchange_a_parameter, take_out, rename])
def test_a_tree_is_walked_again_where_something_was_exchanged(change):
    model = Fickle()
    tree = walk.Tree(model)
    before = tree.look()
    assert all(x is y for x, y in zip(tree.look(), before, strict=True))
    change(model)
    assert tree.modules() == list(model.modules())
    assert list(tree.named_parameters().items()) == list(model.named_parameters())


def test_a_parameter_that_moved_to_the_next_module_has_its_name():
    """All names and parameters come in the same order as before."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    tree = walk.Tree(model)
    tree.look()
    model[1].bias = model[0]._parameters.pop("bias")
    assert [*tree.named_parameters()] == ["0.weight", "1.bias"]


def test_layers_that_a_followed_body_calls_are_stops_too():
    """The head and the norm of a body that adds positions: a hook each, where functions around them are followed."""
    model = GPT(VOCABULARY, 9, layers=1, width=D, heads=2)
    cache = ag.LayerCache(model)
    for _ in range(3):
        with cache:
            model(torch.randint(VOCABULARY, (4, 5))).square().sum().backward()
    (route,) = cache._recorder._routes.values()
    assert {model.tokens, model.norm, model.head} <= {stop.layer for stop in route.stops}
    assert set(route.inside) == {model.positions}


def test_a_layer_frozen_between_two_steps_is_none_of_the_next():
    model = Fickle()
    cache = ag.LayerCache(model)
    for _ in range(4):
        step(model, cache)
    model.block[0].requires_grad_(False)
    step(model, cache)
    assert not cache.recorded.deviation
    assert cache.recorded.covered() == {"block.2.weight", "block.2.bias", "last.weight", "last.bias"}


class Shifted(nn.Module):
    """Layers, and one function that meets a parameter: behind it, or not, the block runs once more."""

    def __init__(self, again):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        self.other = nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.last = nn.Linear(D, 2)
        self.shift = nn.Parameter(torch.ones(D))
        self.again = again

    def forward(self, x):
        x = self.block(x) + self.shift
        x = self.other(x).sin()
        return self.last((self.block(x) if self.again else x).cos())


@pytest.mark.parametrize("again", [False, True])
def test_nothing_is_followed_after_the_last_call_that_has_to_be(again, monkeypatch):
    followed = []
    real = Recorder._follow
    monkeypatch.setattr(Recorder, "_follow", lambda self, func, *rest: followed.append(func.__name__) or real(self, func, *rest))
    model = Shifted(again)
    cache = ag.LayerCache(model)
    for _ in range(4):
        followed.clear()
        with cache:
            out = model(torch.randn(4, D))
        out.square().sum().backward()
    assert any(cache._recorder._routes.values()) and not cache.recorded.deviation
    assert "add" in followed and ("cos" in followed) is again  # the block's hooks serve both of its calls


def test_one_look_at_a_model_serves_until_somebody_could_exchange_a_module():
    model = Fickle()
    tree = walk.Tree(model)
    with tree.steady() as modules:
        assert modules == list(model.modules())
        take_out(model)
        assert tree.modules() is modules
        tree.stir()
        assert tree.modules() == list(model.modules())
    put_in(model)
    assert tree.modules() == list(model.modules())
