"""The vector-Jacobian product of one Adam step against autograd, through a step written out here and through torch's own; then
the extension against that definition in float64, by the rule of ``rounding``."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS, assert_as_good, spread

from adam_ghost import extension
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import StepScalars

SHAPES = [(3, 5), (), (40, 7), (0,), (1,)]
NAMES = ("w", "m", "v", "v_max")
needs_cpp = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")
IMPLS = [pytest.param("cpp", marks=needs_cpp), "reference"]


def step(s, w, m, v, v_max, g):
    """The state after a step of Adam, as its paper writes it; ``v_max`` comes back as it is where it is not used."""
    g = -g if s.maximize else g
    if s.weight_decay and not s.decoupled:
        g = g + s.weight_decay * w
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * g**2
    v_max = torch.maximum(v_max, v) if s.amsgrad else v_max
    denominator = ((v_max if s.amsgrad else v) / (1 - s.beta2**s.t)).sqrt() + s.eps
    decayed = w * (1 - s.lr * s.weight_decay) if s.decoupled else w
    return decayed - s.lr * m / (1 - s.beta1**s.t) / denominator, m, v, v_max


def draw(shapes=SHAPES, K=None, seed=0):
    """States before a step, gradients, and derivatives by the states after it; lists of float64, one entry per shape."""
    r = torch.Generator().manual_seed(seed)
    new = lambda s: torch.randn(s, generator=r, dtype=torch.float64)  # noqa: E731
    state = {"w": [new(s) for s in shapes], "m": [0.3 * new(s) for s in shapes]}
    state |= {name: [new(s) ** 2 for s in shapes] for name in ("v", "v_max")}
    lambdas = {name: [new(s if K is None else (K, *s)) for s in shapes] for name in NAMES}
    return state, [new(s) for s in shapes], lambdas


def swept(s, state, grads, lambdas, impl=None):
    """``adam_op.adjoint`` on copies: the derivatives by the state before, and by the gradients, ``w, m, v, v_max, g``."""
    moved = {name: [x.clone() for x in xs] for name, xs in lambdas.items()}
    out = [torch.full_like(x, torch.nan) for x in moved["w"]]
    held = [state["w"], grads, state["m"], state["v"], state["v_max"]]
    adam_op.adjoint(*held, [s] * len(out), *moved.values(), out=out, impl=impl)
    return [*moved.values(), out]


def pulled_back(s, state, grads, lambdas):
    """The same by ``torch.func.vjp``."""
    lists = [*(state[name] for name in NAMES), grads]
    found = []
    for i, inputs in enumerate(zip(*lists, strict=True)):
        _, pull = torch.func.vjp(lambda *x: step(s, *x), *inputs)
        after = tuple(lambdas[name][i] for name in NAMES)
        found.append(torch.func.vmap(pull)(after) if after[0].ndim > inputs[0].ndim else pull(after))
    return list(zip(*found, strict=True))


def assert_close(got, want, rtol=1e-12):
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            scale = y.abs().max() if y.numel() else 0  # an element is a difference of terms of the others' size
            assert torch.allclose(x, y, rtol=rtol, atol=rtol * float(scale))


OPTIONS = [
    StepScalars(t, 1e-2, beta1, beta2, eps, decay, decoupled, amsgrad, maximize)
    for t, (beta1, beta2), eps, (decay, decoupled), amsgrad, maximize in itertools.product(
        (1, 7), ((0.9, 0.99), (0.0, 0.0)), (1e-8, 10.0), ((0.0, False), (0.2, False), (0.2, True)), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("K", [None, 3])
@pytest.mark.parametrize("s", OPTIONS, ids=lambda s: "-".join(map(str, s)))
def test_is_the_derivative_of_the_step(s, K):
    drawn = draw(K=K)
    assert_close(swept(s, *drawn), pulled_back(s, *drawn))


def test_ties_are_shared_as_by_torch_maximum():
    s = StepScalars(3, 1e-2, 0.5, 0.5, 1e-8, amsgrad=True)  # powers of two: the new second moment is v_max to the bit
    state, grads, lambdas = draw([(4,)])
    state["v"][0].fill_(2.0)
    grads[0].fill_(2.0)
    state["v_max"][0].copy_(torch.tensor([3.0, 3.0, 2.0, 4.0]))
    assert_close(swept(s, state, grads, lambdas), pulled_back(s, state, grads, lambdas))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_where_the_second_moment_is_zero(amsgrad):
    """No gradient ever: the first moment's path alone; with a momentum left over the root is taken to stand still."""
    s = StepScalars(3, 1e-2, 0.9, 0.99, 1e-8, amsgrad=amsgrad)
    state, grads, lambdas = draw([(6,)])
    for x in (state["v"], state["v_max"], grads):
        x[0].zero_()
    w, m, v, v_max, g = (x[0] for x in swept(s, state, grads, lambdas))
    l_w, l_m, l_v, l_v_max = (lambdas[name][0] for name in NAMES)
    at_m = l_m - l_w * s.lr / s.bc1 / s.eps
    at_v = l_v + l_v_max / 2 if amsgrad else l_v
    expected = [l_w, s.beta1 * at_m, s.beta2 * at_v, l_v_max / 2 if amsgrad else l_v_max, (1 - s.beta1) * at_m]
    assert_close([[x] for x in (w, m, v, v_max, g)], [[x] for x in expected])


def test_absent_state_is_zero():
    s = StepScalars(2, 1e-2, 0.9, 0.99, 1e-8, 0.1, amsgrad=True)
    state, grads, lambdas = draw()
    absent = {"w": state["w"], "m": [None] * 5, "v": [None, *state["v"][1:]], "v_max": [None] * 5}
    zeros = {k: [torch.zeros_like(w) if x is None else x for x, w in zip(xs, state["w"], strict=True)] for k, xs in absent.items()}
    gone = [grads[0], None, *grads[2:]]
    given = [torch.zeros_like(w) if x is None else x for x, w in zip(gone, state["w"], strict=True)]
    assert_close(swept(s, absent, gone, lambdas), swept(s, zeros, given, lambdas), 0)


@pytest.fixture
def float64():
    """torch's optimizers count their steps, and correct the moments' bias, in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}], ids=str
)
def test_is_the_derivative_of_torch_optim(kind, options):
    """Three steps of torch's own optimizer, differentiated by autograd, against as many adjoints one after another."""
    r = torch.Generator().manual_seed(1)
    w0 = torch.randn(5, 3, generator=r, dtype=torch.float64)
    gs = [torch.randn(5, 3, generator=r, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lambda_w = torch.randn(5, 3, generator=r, dtype=torch.float64)

    start = w0.clone().requires_grad_()
    w = start.clone()
    opt = kind([w], lr=3e-2, betas=(0.8, 0.9), foreach=False, fused=False, differentiable=True, **options)
    states = []
    for g in gs:
        held = opt.state.get(w, {})
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        states.append([w.detach().clone(), *(held[k].detach().clone() if k in held else None for k in names)])
        w.grad = g
        opt.step()
        opt.state[w] = {k: x.clone() for k, x in opt.state[w].items()}  # the next step would overwrite what autograd saved
    wanted = torch.autograd.grad(w, [start, *gs], lambda_w)

    lambdas = [[x] for x in (lambda_w.clone(), *(torch.zeros_like(w0) for _ in range(3)))]
    group, found = opt.param_groups[0], []
    for t, (at, m, v, v_max), g in reversed(list(zip((1, 2, 3), states, gs, strict=True))):
        s = StepScalars(
            t, 3e-2, 0.8, 0.9, 1e-8, group["weight_decay"], kind is torch.optim.AdamW, group["amsgrad"], group["maximize"]
        )
        out = [torch.empty_like(w0)]
        adam_op.adjoint([at], [g.detach()], [m], [v], [v_max], [s], *lambdas, out=out)
        found.append(out[0])
    assert_close([[x] for x in (lambdas[0][0], *reversed(found))], [[x] for x in wanted])


def good():
    state, grads, lambdas = draw([(3,), (4, 5)])
    held = {"params": state["w"], "grads": grads, "exp_avgs": state["m"], "exp_avg_sqs": state["v"]}
    held |= {"max_exp_avg_sqs": state["v_max"], "steps": [StepScalars(3, 1e-3, 0.9, 0.999, 1e-8, amsgrad=True)] * 2}
    held |= {f"lambda_{name}": xs for name, xs in lambdas.items()}
    return held | {"out": [torch.full_like(x, torch.nan) for x in lambdas["w"]]}


BAD = {
    "exp_avgs": (lambda x, _: x[:-1], r"exp_avgs: expected 2 entries, one per parameter, got 1"),
    "grads": (lambda x, _: [x[0], x[1][:2]], r"grads\[1\]: expected shape \[4, 5\], got \[2, 5\]"),
    "lambda_w": (lambda x, _: [x[0].expand(2, 2, 3), x[1]], r"lambda_w\[0\]: expected 1 dimensions, or one more, got 3"),
    "lambda_m": (lambda x, _: [x[0], x[1].expand(2, 4, 5)], r"lambda_m\[1\]: expected shape \[4, 5\], got \[2, 4, 5\]"),
    "lambda_v": (lambda x, _: [x[0].to("meta"), x[1]], r"lambda_v\[0\]: expected a tensor on cpu, as params\[0\], got meta"),
    "lambda_v_max": (lambda x, _: [], r"lambda_v_max: expected 2 entries, one per parameter, for amsgrad's steps, got 0"),
    "out": (lambda x, all: [x[0], all["lambda_w"][1]], r"lambda_w\[1\]: expected a tensor of its own, got that of another list"),
    "steps": (lambda x, _: x[:1], r"steps: expected 2 entries, one per parameter, got 1"),
}


@pytest.mark.parametrize("name, change, message", [(k, *v) for k, v in BAD.items()], ids=BAD)
def test_errors_name_the_argument_and_change_nothing(name, change, message):
    given = good()
    before = [x.clone() for k in given if k.startswith("lambda") for x in given[k]]
    out = given["out"]
    with pytest.raises(ValueError, match=message):
        adam_op.adjoint(**{**given, name: change(given[name], given)})
    assert all(x.isnan().all() for x in out)
    assert all(map(torch.equal, before, [x for k in given if k.startswith("lambda") for x in given[k]]))


def test_opcheck():
    given = good()
    table, rows = adam_op.step_table(given["params"], given.pop("steps"))
    torch.library.opcheck(torch.ops.adam_ghost.adjoint.default, [*given.values(), table, rows, None])
    given["lambda_v_max"] = []
    table[:, StepScalars._fields.index("amsgrad")] = 0
    torch.library.opcheck(torch.ops.adam_ghost.adjoint.default, [*given.values(), table, rows, None])


def test_compiles_without_a_graph_break():
    def f(given, lr):
        steps = [s._replace(lr=lr) for s in given["steps"]]
        adam_op.adjoint(**{**given, "steps": steps})
        return given["out"] + given["lambda_w"]

    lr = torch.tensor(1e-3)
    for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(good(), lr), f(good(), lr), strict=True):
        torch.testing.assert_close(a, b)


# ---- the extension ----


def cast(drawn, dtype, state_dtype=None, lambda_dtype=None):
    """``draw``'s weights and gradients in one dtype, the moments and the lambdas in others."""
    state, grads, lambdas = drawn
    moments = {k: [x.to(state_dtype or dtype) for x in xs] for k, xs in state.items()}
    moments["w"] = [x.to(dtype) for x in state["w"]]
    lambdas = {k: [x.to(lambda_dtype or dtype) for x in xs] for k, xs in lambdas.items()}
    return moments, [x.to(dtype) for x in grads], lambdas


def sizes(s, w, g, m, v, v_max, l_w, l_m, l_v, l_v_max):
    """The terms that each result is a sum of, by absolute value."""
    path = definition._path(s, w, g, m, v, v_max)
    x, denominator = path.start.abs() + path.g.abs(), path.root(path.start + path.g) + s.eps
    per_m, root = s.lr / s.bc1 / denominator, denominator - s.eps
    to_m = l_m.abs() + l_w.abs() * per_m
    by_u = per_m * (s.beta1 * path.m.abs() + (1 - s.beta1) * x) / denominator / (2 * s.bc2 * root)
    to_u = l_w.abs() * torch.where(root > 0, by_u, 0) + l_v_max.abs() * s.amsgrad
    to_x = (1 - s.beta1) * to_m + 2 * (1 - s.beta2) * x * (l_v.abs() + to_u)
    return l_w.abs() + s.weight_decay * to_x, to_m, l_v.abs() + to_u, l_v_max.abs() + to_u, to_x


def assert_as_good_as_float32(s, drawn, impl):
    """Of tensors of any dtype, every result; returned."""
    state, grads, lambdas = drawn
    got = swept(s, *drawn, impl=impl)
    low = swept(s, *cast(drawn, torch.float32), impl="reference")
    exact = swept(s, *cast(drawn, torch.float64), impl="reference")
    for i in range(len(grads)):
        columns = [state["w"], grads, *(state[k] for k in NAMES[1:]), *lambdas.values()]
        inputs = [column[i].double() for column in columns]
        terms = sizes(s, *inputs)
        for j, name in enumerate(definition.Adjoint._fields):
            pick = lambda *x, j=j: definition.step_adjoint(s, *x)[j]  # noqa: E731
            bound = spread(pick, inputs, torch.finfo(got[j][i].dtype).eps / 2) + 16 * EPS * terms[j]
            assert got[j][i].shape == lambdas["w"][i].shape, name
            assert_as_good(got[j][i], low[j][i], exact[j][i], bound)
    return got


KINDS = {
    "adam": StepScalars(3, 1e-3, 0.9, 0.999, 1e-8),
    "first": StepScalars(1, 1e-3, 0.9, 0.999, 1e-8),
    "l2": StepScalars(10, 1e-2, 0.9, 0.95, 1e-8, 0.1),
    "adamw-maximize": StepScalars(1000, 3e-4, 0.9, 0.95, 1e-8, 0.1, decoupled=True, maximize=True),
    "amsgrad-l2-maximize": StepScalars(7, 1e-3, 0.9, 0.99, 1e-8, 0.2, amsgrad=True, maximize=True),
}
kinds = pytest.mark.parametrize("s", KINDS.values(), ids=KINDS)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("impl", IMPLS)
@kinds
@pytest.mark.parametrize("K", [None, 3])
def test_matches_float64(s, K, impl):
    assert_as_good_as_float32(s, cast(draw([*SHAPES, (513,), (100, 400)], K), FULL), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", list(itertools.product((FULL, HALF), repeat=3)), ids=str)
def test_dtypes(dtypes, impl):
    got = assert_as_good_as_float32(KINDS["amsgrad-l2-maximize"], cast(draw(K=2), *dtypes), impl)
    assert {x.dtype for xs in got for x in xs} == {dtypes[2]}


# magnitudes that states really hold: never touched, denormal, tiny, ordinary, huge
magnitude = st.sampled_from([0.0, 1e-42, 1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e12])
element = st.tuples(*([magnitude] * 4), *([st.floats(-1, 1)] * 7))
drawn_steps = st.builds(
    StepScalars,
    t=st.sampled_from([1, 2, 10, 10**6]),
    lr=st.sampled_from([1e-6, 1e-3, 1.0]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.0, 0.95, 0.99999]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(elements=st.lists(element, min_size=1, max_size=40), s=drawn_steps)
def test_any_state_is_as_good_as_float32(impl, elements, s):
    size, m, v, v_max, w, x, y, *lambdas = (torch.tensor(c, dtype=torch.float64) for c in zip(*elements, strict=True))
    g = size * x
    v = torch.maximum(v, g.square() * (0 if s.t == 1 else 1e-3))
    state = {"w": [w], "m": [torch.minimum(m, v.sqrt()) * y], "v": [v], "v_max": [torch.maximum(v, v_max)]}
    drawn = state, [g], {k: [x] for k, x in zip(NAMES, lambdas, strict=True)}
    assert_as_good_as_float32(s, cast(drawn, FULL), impl)


def views(x):
    """The same values, lying otherwise: off the vector alignment, transposed, strided."""
    shifted = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view_as(x).copy_(x)
    strided = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)[..., ::2].copy_(x)
    return shifted, x.mT.contiguous().mT, strided


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", range(3), ids=["unaligned", "transposed", "strided"])
@pytest.mark.parametrize("only", [None, "w", "v", "lambda_w", "lambda_v", "out"], ids=lambda x: x or "all")
def test_layouts(kind, only, impl):
    s = KINDS["amsgrad-l2-maximize"]
    state, grads, lambdas = cast(draw([(33, 65), (64, 48)], K=2), FULL)
    want = swept(s, state, grads, lambdas, impl=impl)
    lay = lambda name, xs: [views(x)[kind] for x in xs] if only in (None, name) else [x.clone() for x in xs]  # noqa: E731
    state = {k: lay(k, xs) for k, xs in state.items()}
    moved = [lay(f"lambda_{k}", xs) for k, xs in lambdas.items()]
    out = lay("out", [torch.zeros_like(x) for x in lambdas["w"]])
    adam_op.adjoint(state["w"], lay("g", grads), state["m"], state["v"], state["v_max"], [s] * 2, *moved, out=out, impl=impl)
    for a, b in zip([*moved, out], want, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [0, 1, 1000])
def test_many_small_parameters_with_their_own_steps(n, impl):
    state, grads, lambdas = cast(draw([(i % 5,) for i in range(n)]), FULL)
    own = [StepScalars(1 + i % 7, 1e-3 * (1 + i % 3), 0.9, 0.999, 1e-8, maximize=bool(i % 2)) for i in range(n)]
    moved, out = [[x.clone() for x in lambdas[k]] for k in NAMES[:3]], [torch.zeros_like(g) for g in grads]
    adam_op.adjoint(state["w"], grads, state["m"], state["v"], [None] * n, own, *moved, [], out=out, impl=impl)
    for i in range(0, n, 97):
        one = {k: xs[i : i + 1] for k, xs in state.items()}
        want = swept(own[i], one, grads[i : i + 1], {k: xs[i : i + 1] for k, xs in lambdas.items()}, impl=impl)
        assert all(torch.equal(a[i], b[0]) for a, b in zip([*moved, out], [*want[:3], want[4]], strict=True))


@needs_cpp
def test_result_does_not_depend_on_the_number_of_threads():
    drawn, found = cast(draw([(200_001,), (7,), (100, 1000)]), FULL), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(swept(KINDS["l2"], *drawn))
    finally:
        torch.set_num_threads(before)
    for a, b in itertools.pairwise(found):
        assert all(torch.equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_lambda_v_max_is_amsgrads(impl):
    """Elsewhere it stays as it is, whatever the dtype, and may be missing."""
    for dtype in (FULL, HALF):
        drawn = cast(draw(K=2), dtype)
        got = swept(KINDS["adam"], *drawn, impl=impl)
        assert all(map(torch.equal, got[3], drawn[2]["v_max"]))


@pytest.mark.parametrize("strided", [False, True])
def test_memory_of_two_lists_is_refused(strided):
    given = cast(draw([(4, 5)]), FULL)[2] | {"out": [torch.zeros(4, 5)]}
    held = torch.zeros(4, 10)[:, ::2] if strided else torch.zeros(4, 5)
    given["m"], given["out"] = [held], [held.view_as(held)]
    with pytest.raises(ValueError, match=r"lambda_m\[0\]: expected a tensor of its own, got that of another list"):
        adam_op.adjoint(
            [torch.ones(4, 5)], [None], [None], [None], [None], [KINDS["adam"]], *map(given.get, NAMES), out=given["out"]
        )
    assert not held.any()
