"""Lookahead in compiled models scores what is shown to be a batch, and names the rest: sizes that look alike tell nothing."""

import copy
import warnings

import pytest
import torch
from models import D, Fn, N, inputs, normal
from oracles import close, gradients, inner, losses
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. step 1 has no scores")


def two(middle, **members):
    return Fn(middle, a=nn.Linear(D, D), b=nn.Linear(D, D), **members)


# name: (model, the parameters that are named)
MODELS = {
    "plain": (lambda: two(lambda s, x: s.b(torch.tanh(s.a(x)))), ""),
    "time-major": (lambda: two(lambda s, x: s.b(s.a(x).transpose(0, 1)).transpose(0, 1)), "b"),
    "prototypes": (lambda: two(lambda s, x: s.a(x) + s.b(s.table).mean(0), table=normal(N, D)), "b table"),
    "flipped-and-back": (lambda: two(lambda s, x: s.b(s.a(x).flip(0)).flip(0)), "b"),
    "mean-off": (lambda: two(lambda s, x: s.b(s.a(x) - s.a(x).mean(0))), "b"),
    "tied-function": (lambda: two(lambda s, x: F.linear(s.b(x), s.a.weight.t()) + s.a(x)), "a.weight"),
    "positions": (lambda: two(lambda s, x: s.b(s.a(x) + s.n(s.p)), n=nn.LayerNorm(D), p=normal(N, D)), "n p"),
    "softmax": (lambda: two(lambda s, x: s.b(torch.special.softmax(s.a(x), 0))), "b"),
    "two-calls": (lambda: two(lambda s, x: s.b(x) + s.a(s.a(x).flip(0))), "a"),
    "layer-norm": (lambda: two(lambda s, x: s.b(F.layer_norm(s.a(x).movedim(0, -1), (N,)).movedim(-1, 0))), "b"),
}


def is_named(name, named):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in named.split())


ALONE = {"plain", "time-major", "prototypes", "positions"}  # where a sample's loss is the same in any batch


def check(name, compiled, model, prefix):
    """Trains for three steps: the first has no history, the others' scores are compared and their warnings read."""
    named = MODELS[name][1]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    val = inputs("x", N, N, 9)
    run = ag.InRun(compiled, optimizer, lambda: losses(compiled(val)).sum(), "lookahead")
    want = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            x = inputs("x", N, N, step)
            run.batch([f"{step}-{i}" for i in range(N)])
            losses(compiled(x)).sum().backward()
            direction = run._schedule._direction
            if direction is not None and name in ALONE:
                plain.load_state_dict(model.state_dict())
                P = {k.removeprefix(prefix): v[0] for k, v in direction.P.items()}
                for i in range(N):
                    grads = gradients(losses(plain(x[i : i + 1])).sum(), dict(plain.named_parameters()))
                    want.append(inner(P, {k: g for k, g in grads.items() if not is_named(k, named)}))
            optimizer.step()
            optimizer.zero_grad()
        run.close()
    assert sum("step 1 has no scores" in str(w.message) for w in caught) == 1
    told = [str(w.message) for w in caught if "not attributed" in str(w.message)]
    missing = [prefix + k for k, _ in plain.named_parameters() if is_named(k, named)]
    assert bool(told) == bool(missing) == (run.coverage.share < 1)
    assert all(k in told[0] for k in missing)
    if name in ALONE:
        close(torch.tensor(run.scores().total), torch.stack(want))


def built(name):
    torch.manual_seed(0)
    torch._dynamo.reset()
    return MODELS[name][0]().double()


@pytest.mark.parametrize("name", MODELS)
def test_named_or_right(name):
    model = built(name)
    check(name, torch.compile(model, fullgraph=True, backend="eager"), model, "_orig_mod.")


@pytest.mark.parametrize("name", ["plain", "time-major"])
def test_compiled_in_place(name):
    model = built(name)
    model.compile(fullgraph=True, backend="eager")
    check(name, model, model, "")


def test_nothing_left_to_attribute():
    model = torch.compile(Fn(lambda s, x: s.a(x.flip(1).transpose(0, 1)), a=nn.Linear(D, D)), backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    with ag.InRun(model, optimizer, lambda: model(torch.ones(N, N, D)).sum(), "lookahead") as run:
        run.batch(range(N))
        model(torch.ones(N, N, D)).sum().backward()
        optimizer.step()
        run.batch(range(N))
        with pytest.raises(ValueError, match="there is nothing to attribute"):
            model(torch.ones(N, N, D))


def test_wrong_number_of_ids():
    model = torch.compile(nn.Linear(D, 2), backend="eager")
    optimizer = torch.optim.Adam(model.parameters())
    with ag.InRun(model, optimizer, lambda: model(torch.ones(2, D)).sum(), "lookahead") as run:
        run.batch(range(4))
        model(torch.ones(4, D)).sum().backward()
        optimizer.step()
        run.batch(range(3))
        with pytest.raises(ValueError, match="got 3 ids, but the model was called with a batch of 4"):
            model(torch.ones(4, D))


def test_plan_leaves_nothing_behind():
    """Random numbers and buffers of training are those of a run without attribution."""

    def train(attributed):
        torch.manual_seed(0)
        torch._dynamo.reset()
        body = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, 2))
        model = torch.compile(body, backend="eager")
        optimizer = torch.optim.Adam(model.parameters())
        run = ag.InRun(model, optimizer, lambda: body[0](torch.ones(2, D)).sum(), "lookahead") if attributed else None
        for step in range(3):
            if run:
                run.batch(range(4))
            model(torch.ones(4, D) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.get_rng_state(), body[2].weight.detach()

    (a, w), (b, v) = train(False), train(True)
    assert torch.equal(a, b)
    torch.testing.assert_close(w, v)


def by_flag(s, x):
    return s.b(s.a(x).flip(0)).flip(0) if s.flips else s.b(s.a(x))


def by_value(s, x):
    return s.b(s.a(x).flip(0)).flip(0) if x[0, 0, 0] > 0 else s.b(s.a(x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("decided", [by_flag, by_value])
def test_other_code_within_a_kind_is_noticed(decided, in_place):
    """Compiled in a step whose plan was made before: that step has no scores, and each later one a plan of its own."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = two(decided, flips=False)
    compiled = model if in_place else torch.compile(model, backend="eager")
    if in_place:
        model.compile(backend="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    run = ag.InRun(compiled, optimizer, lambda: model.b(torch.ones(2, D)).sum(), "lookahead")
    led = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model.flips in (False, False, False, True, False, True):
            x = torch.rand(N, 2, D) * (1 if model.flips else -1)
            run.batch(range(N))
            compiled(x).square().sum().backward()
            sites = run._schedule._compiled.sites
            led.append([site.led for site in sites])
            optimizer.step()
            optimizer.zero_grad()
    run.close()
    assert [s.step for s in run.steps if s.skipped] == [4]
    assert led[2:] == [[True, True], [True, True], [True, True], [True, False]]
    assert sum("step 4: the compiled model ran other code" in str(w.message) for w in caught) == 1


LATER = {
    "a copy": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: model.compile(backend="eager") or model,
    "a part": lambda model: model[1].compile(backend="eager") or model,
    "a layer": lambda model: model[1][0].compile(backend="eager") or model,
    "a function that calls it": lambda model: torch.compile(lambda x: model(x) * 2, backend="eager"),
}
COMPILED = "the model, a part of it or a function that calls it is compiled"


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Linear(D, 2)).double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("taken", [0, 12], ids=["in the first step", "when the model is known"])
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
@pytest.mark.parametrize("how", LATER)
def test_compiled_after_the_run_was_built(how, schedule, taken):
    """An error says so before anything is scored, and takes nothing from the steps around it."""
    torch._dynamo.reset()
    x, val = inputs("x", N, N, 0), inputs("x", N, N, 9)

    def train(meddle):
        model, optimizer = small()
        run = ag.InRun(model, optimizer, lambda: losses(model(val)).sum(), schedule)
        for step in range(taken + 2):
            if meddle and step == taken:
                called = LATER[how](model)
                run.batch(f"meddled-{i}" for i in range(N))
                with pytest.raises(RuntimeError, match=COMPILED):
                    called(x)
                for module in model.modules():
                    module._compiled_call_impl = None
            run.batch(f"{step}-{i}" for i in range(N))
            losses(model(x)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        run.close()
        return run.scores()

    left, alone = train(True), train(False)
    assert list(left.ids) == list(alone.ids) and list(left.total) == list(alone.total)


@pytest.mark.parametrize("how", LATER)
def test_compiled_after_the_cache_was_built(how):
    torch._dynamo.reset()
    model, _ = small()
    cache = ag.LayerCache(model, lambda: losses(model(inputs("x", N, N, 9))).sum())
    called = LATER[how](model)
    with pytest.raises(RuntimeError, match=COMPILED), cache:
        called(inputs("x", N, N, 0))


def test_a_compiled_copy_may_be_evaluated():
    torch._dynamo.reset()
    model, optimizer = small()
    x = inputs("x", N, N, 0)
    compiled = torch.compile(model, backend="eager")
    with ag.InRun(model, optimizer, lambda: losses(model(x)).sum()) as run:
        run.batch(range(N))
        losses(model(x)).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        optimizer.step()
        assert list(run.scores().ids) == list(range(N))


def test_compiled_without_any_layer():
    torch._dynamo.reset()
    model = Fn(lambda s, x: s.tanh(x @ s.w), tanh=nn.Tanh(), w=normal(D, D)).double()
    cache = ag.LayerCache(model, lambda: losses(model(inputs("x", N, N, 9))).sum())
    with pytest.raises(RuntimeError, match=COMPILED), cache:
        torch.compile(model, backend="eager")(inputs("x", N, N, 0))
