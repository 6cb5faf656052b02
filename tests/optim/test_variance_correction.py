"""variance_correction and weight_points against the float64 reference: what the extension computes, and what it refuses.

Tolerance: the error to the float64 reference is at most that of the same reference run in float32 on the same inputs, plus
what some roundings of the inputs, and of the terms of ``S``, do to the float64 result. Sums are formed in float64: their
bound is that of their terms.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EPS, assert_as_good, spread

from adam_ghost import extension
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim import adam_op
from adam_ghost.optim.adam_definition import RULES, StepScalars

needs_cpp = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")
IMPLS = [pytest.param("cpp", marks=needs_cpp), "reference"]
STATE = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
SHAPES = [(3, 5), (), (1000, 37), (0,), (1,), (513,), (2, 3, 4, 5)]
STEPS = {
    "adam": StepScalars(3, 1e-3, 0.9, 0.999, 1e-8),
    "first": StepScalars(1, 1e-3, 0.9, 0.999, 1e-8),
    "l2": StepScalars(10, 1e-2, 0.9, 0.95, 1e-8, 0.1),
    "adamw": StepScalars(1000, 3e-4, 0.9, 0.95, 1e-8, 0.1, decoupled=True),
    "amsgrad": StepScalars(7, 1e-3, 0.9, 0.99, 1e-8, amsgrad=True),
    "amsgrad-l2-maximize": StepScalars(7, 1e-3, 0.9, 0.99, 1e-8, 0.2, amsgrad=True, maximize=True),
    "maximize": StepScalars(50, 1e-3, 0.8, 0.999, 1e-6, 0.01, decoupled=True, maximize=True),
}
steps = pytest.mark.parametrize("s", STEPS.values(), ids=STEPS.keys())


def draw(shapes, dtype=torch.float32, state_dtype=torch.float32, K=None, seed=0):
    """Adam's state of parameters of these shapes, and their validation gradients."""
    r = torch.Generator().manual_seed(seed)
    new = lambda shape: torch.randn(shape, generator=r, dtype=torch.float64)  # noqa: E731
    lists = {name: [new(s).to(dtype) for s in shapes] for name in ("params", "grads")}
    lists["exp_avgs"] = [(new(s) * 0.3).to(state_dtype) for s in shapes]
    for name in STATE[3:]:
        lists[name] = [(new(s) ** 2).to(state_dtype) for s in shapes]
    lists["val_grads"] = [new(s if K is None else (K, *s)).to(dtype) for s in shapes]
    return lists


def mapped(lists, f):
    return {name: [x if x is None else f(x) for x in xs] for name, xs in lists.items()}


def wide(lists):
    return mapped(lists, torch.Tensor.double)


def assert_correct(lists, s, rule, impl, out_dtype=None):
    call = lambda lists, **how: adam_op.variance_correction(**lists, steps=[s] * len(lists["params"]), rule=rule, **how)  # noqa: E731
    into = lambda dtype: [torch.full_like(x, math.nan, dtype=dtype) for x in lists["val_grads"]]  # noqa: E731
    got, low = call(lists, impl=impl, out=into(out_dtype)), call(lists, impl="reference", out=into(torch.float32))
    exact, unit = call(wide(lists), impl="reference"), torch.finfo(got.P[0].dtype).eps / 2
    for i, (val, w, g, m, v, v_max) in enumerate(zip(*(wide(lists)[k] for k in ("val_grads", *STATE)), strict=True)):
        of_P = spread(lambda *x: definition.direction(rule, s, *x), [val, w, g, m, v, v_max], unit)
        path = definition._path(s, w, g, m, v, v_max)  # S is a difference of which this is the first term
        of_P = of_P + 8 * EPS * (val * s.lr * (1 - s.beta1) / s.bc1 / (path.root(path.start + path.g) + s.eps)).abs()
        of_moved = spread(
            lambda w, *x: s.decoupled * s.lr * s.weight_decay * w + s.lr * definition.adam_update(s, w, None, *x),
            [w, m, v, v_max],
            0,
        )
        assert_as_good(got.P[i], low.P[i], exact.P[i], of_P)
        total = lambda x, lead=val.ndim - w.ndim: x.unsqueeze(-1).flatten(lead).sum(-1).reshape(-1)  # noqa: E731
        of_sums = torch.cat([total(of_P * g.abs()), total(of_moved * val.abs())])
        assert_as_good(got.sums.table[i], low.sums.table[i], exact.sums.table[i], of_sums)
    return got


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
@steps
def test_matches_float64(s, rule, impl):
    assert_correct(draw(SHAPES), s, rule, impl)


DTYPES = [
    (p, q, o) for p in (torch.float32, torch.bfloat16) for q in (torch.float32, torch.bfloat16) for o in (None, torch.float32)
]


@pytest.mark.parametrize("dtype, state_dtype, out_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_and_targets(dtype, state_dtype, out_dtype, impl):
    lists = draw(SHAPES, dtype, state_dtype, K=3)
    got = assert_correct(lists, STEPS["amsgrad-l2-maximize"], "secant", impl, out_dtype)
    assert all(P.dtype == (out_dtype or dtype) and P.shape == v.shape for P, v in zip(got.P, lists["val_grads"], strict=True))
    assert got.sums.reached.shape == (len(SHAPES), 3)
    torch.testing.assert_close(got.sums.total().history, got.sums.history.sum(0))


# magnitudes that states really hold: never touched, denormal, tiny, ordinary, huge
magnitude = st.sampled_from([0.0, 1e-42, 1e-38, 1e-30, 1e-20, 1e-10, 1e-4, 1.0, 1e4, 1e12, 1e18])
element = st.tuples(*([magnitude] * 5), st.floats(-1, 1), st.floats(-1, 1), st.floats(-1, 1))
drawn_steps = st.builds(
    StepScalars,
    t=st.sampled_from([1, 2, 3, 10, 1000, 10**6]),
    lr=st.sampled_from([1e-6, 1e-3, 1.0]),
    beta1=st.sampled_from([0.0, 0.9, 0.99]),
    beta2=st.sampled_from([0.0, 0.95, 0.999, 0.99999]),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    amsgrad=st.booleans(),
    maximize=st.booleans(),
)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(elements=st.lists(element, min_size=1, max_size=40), s=drawn_steps, rule=st.sampled_from(RULES))
def test_any_state_is_finite_and_as_good_as_float32(impl, elements, s, rule):
    size, m, v, v_max, val, x, y, z = (torch.tensor(column, dtype=torch.float64) for column in zip(*elements, strict=True))
    g = size * x
    v = torch.maximum(v.clamp(max=1e12), g.square().clamp(max=1e30) * (0 if s.t == 1 else 1e-3))
    lists = {"params": [x + y], "grads": [g], "exp_avgs": [torch.minimum(m, v.sqrt()) * y], "exp_avg_sqs": [v]}
    lists |= {"max_exp_avg_sqs": [torch.maximum(v, v_max.clamp(max=1e30))], "val_grads": [val.clamp(max=1e6) * z]}
    lists = mapped(lists, torch.Tensor.float)
    got = assert_correct(lists, s, rule, impl)
    assert got.P[0].isfinite().all() and got.sums.table.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", RULES)
def test_untouched_state_is_finite(rule, impl):
    """Zeros and denormals in v: products of three small denominators would underflow to 0 / 0."""
    v = torch.tensor([0.0, 1e-45, 1e-40, 1e-38, 0.0, 0.0])
    g = torch.tensor([0.0, 0.0, 1e-30, 1e-22, 1e-10, 1.0])
    lists = {"params": [torch.ones(6)], "grads": [g], "exp_avgs": [torch.zeros(6)], "exp_avg_sqs": [v], "max_exp_avg_sqs": [v]}
    got = assert_correct({**lists, "val_grads": [torch.ones(6)]}, StepScalars(5, 1e-3, 0.9, 0.999, 1e-15), rule, impl)
    assert got.P[0].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nonfinite_gradients_stay_where_they_are(impl):
    lists = draw([(2000,), (50,)])
    lists["grads"][0][[3, 700]] = math.nan
    lists["grads"][0][1999] = -math.inf
    got = adam_op.variance_correction(**lists, steps=[STEPS["adam"]] * 2, impl=impl)
    assert not got.sums.reached[0].isfinite().any()
    assert got.P[0].isfinite().sum() == 1997 and got.P[1].isfinite().all() and got.sums.table[1].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_absent_state_is_zero(impl):
    lists = draw([(300,), (4, 5), (7,)])
    held = {k: [None if (i + j) % 2 else x for i, x in enumerate(lists[k])] for j, k in enumerate(STATE[1:])}
    zeros = {k: [torch.zeros_like(p) if x is None else x for x, p in zip(held[k], lists["params"], strict=True)] for k in held}
    got, want = (adam_op.variance_correction(**{**lists, **x}, steps=[STEPS["amsgrad"]] * 3, impl=impl) for x in (held, zeros))
    assert all(map(torch.equal, got.P, want.P)) and torch.equal(got.sums.table, want.sums.table)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place(impl):
    lists = draw(SHAPES, K=2)
    want = adam_op.variance_correction(**lists, steps=[STEPS["l2"]] * len(SHAPES), impl=impl)
    for P, g, row in zip(want.P, lists["grads"], want.sums.reached, strict=True):
        torch.testing.assert_close(row, (P.double() * g).reshape(2, -1).sum(1) if P.numel() else torch.zeros(2).double())
    got = adam_op.variance_correction(**lists, steps=[STEPS["l2"]] * len(SHAPES), out=lists["val_grads"], impl=impl)
    assert all(a is b for a, b in zip(got.P, lists["val_grads"], strict=True))
    assert all(map(torch.equal, got.P, want.P)) and torch.equal(got.sums.table, want.sums.table)


def views(x):
    """The same values, lying otherwise: off the vector alignment, transposed, strided."""
    shifted = torch.full((x.numel() + 1,), math.nan, dtype=x.dtype)[1:].view_as(x).copy_(x)
    strided = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)[..., ::2].copy_(x)
    return shifted, x.mT.contiguous().mT, strided


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", range(3), ids=["unaligned", "transposed", "strided"])
@pytest.mark.parametrize("only", [None, "params", "grads", "val_grads"], ids=lambda x: x or "all")
def test_layouts(kind, only, impl):
    lists = draw([(33, 65), (64, 48)])
    laid = {k: [views(x)[kind] for x in xs] if only in (None, k) else xs for k, xs in lists.items()}
    want = adam_op.variance_correction(**lists, steps=[STEPS["l2"]] * 2, impl=impl)
    got = adam_op.variance_correction(**laid, steps=[STEPS["l2"]] * 2, impl=impl, out=laid["val_grads"])
    for a, b in zip(got.P, want.P, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.sums.table, want.sums.table, rtol=1e-6, atol=1e-6)
    mid = [x.clone() for x in laid["params"]]
    adam_op.weight_points(*(laid[k] for k in STATE), [STEPS["l2"]] * 2, mid=mid, impl=impl)
    adam_op.weight_points(*(lists[k] for k in STATE), [STEPS["l2"]] * 2, mid=lists["params"], impl=impl)
    for a, b in zip(mid, lists["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n", [0, 1, 3000])
def test_many_small_parameters_with_their_own_steps(n, impl):
    lists = draw([(i % 5,) for i in range(n)])
    own = [StepScalars(1 + i % 7, 1e-3 * (1 + i % 3), 0.9, 0.999, 1e-8, maximize=bool(i % 2)) for i in range(n)]
    got = adam_op.variance_correction(**lists, steps=own, impl=impl)
    for i in range(0, n, 97):
        want = adam_op.variance_correction(**{k: xs[i : i + 1] for k, xs in lists.items()}, steps=own[i : i + 1], impl=impl)
        assert torch.equal(got.P[i], want.P[0]) and torch.equal(got.sums.table[i], want.sums.table[0])
    assert len(got.P) == n and got.sums.total().reached.shape == (1,)


@needs_cpp
def test_result_does_not_depend_on_the_number_of_threads():
    lists, found = draw([(200_001,), (7,), (100, 1000)]), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(adam_op.variance_correction(**lists, steps=[STEPS["adamw"]] * 3))
    finally:
        torch.set_num_threads(before)
    for a, b in pairwise(found):
        assert all(map(torch.equal, a.P, b.P)) and torch.equal(a.sums.table, b.sums.table)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@steps
def test_weight_points(s, dtype, impl):
    lists = draw(SHAPES, dtype)
    state, n = [lists[k] for k in STATE], len(SHAPES)
    state64 = [wide(lists)[k] for k in STATE]
    made = {k: [torch.full_like(w, math.nan) for w in state[0]] for k in ("empty", "mid")}
    adam_op.weight_points(*state, [s] * n, **made, impl=impl)
    points = {"empty": lambda w, g, *x: definition.empty_weights(s, w, *x), "mid": lambda *x: definition.mid_weights(s, *x)}
    for i, columns in enumerate(zip(*state64, strict=True)):
        for k, f in points.items():
            low, bound = f(*(x[i] for x in state)), spread(f, columns, torch.finfo(dtype).eps / 2)
            assert_as_good(made[k][i], low, f(*columns), bound)
    # in place, and each alone
    for k in made:
        moved = [w.clone() for w in state[0]]
        adam_op.weight_points(moved, *state[1:], [s] * n, **{k: moved}, impl=impl)
        assert all(map(torch.equal, moved, made[k]))


@pytest.mark.parametrize("impl", IMPLS)
def test_scalars_in_tensors(impl):
    lists, s = draw(SHAPES), STEPS["adamw"]
    held = s._replace(t=torch.tensor(float(s.t)), lr=torch.tensor(s.lr, dtype=torch.float64))
    got, want = (adam_op.variance_correction(**lists, steps=[x] * len(SHAPES), impl=impl) for x in (held, s))
    for a, b in zip(got.P, want.P, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


BAD = {
    "exp_avgs": (lambda x: x[:-1], r"exp_avgs: expected 2 entries, one per parameter, got 1"),
    "grads": (lambda x: [x[0], x[1][:2]], r"grads\[1\]: expected shape \[4, 5\], got \[2, 5\]"),
    "val_grads": (lambda x: [x[0].expand(2, 2, 3), x[1]], r"val_grads\[0\]: expected 1 dimensions, or one more, got 3"),
    "out": (lambda x: [x[0], x[1].expand(2, 4, 5)], r"out\[1\]: expected shape \[4, 5\], got \[2, 4, 5\]"),
    "exp_avg_sqs": (lambda x: [x[0].to("meta"), x[1]], r"exp_avg_sqs\[0\]: expected a tensor on cpu, as params\[0\], got meta"),
    "steps": (lambda x: x[:1], r"steps: expected 2 entries, one per parameter, got 1"),
    "rule": (lambda x: "newton", r"rule: expected one of secant, tangent, frozen, sgd, got 'newton'"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("name, change, message", [(k, *v) for k, v in BAD.items()], ids=BAD)
def test_errors_name_the_argument_and_change_nothing(name, change, message, impl):
    lists = draw([(3,), (4, 5)])
    good = {**lists, "steps": [STEPS["adam"]] * 2, "rule": "secant"}
    good["out"] = [torch.full_like(x, math.nan) for x in lists["val_grads"]]
    with pytest.raises(ValueError, match=message):
        adam_op.variance_correction(**{**good, name: change(good[name])}, impl=impl)
    assert all(x.isnan().all() for x in good["out"])


def test_float64_and_unknown_implementations():
    lists = wide(draw([(3,)]))
    assert adam_op.variance_correction(**lists, steps=[STEPS["adam"]]).P[0].dtype == torch.float64
    with pytest.raises(ValueError, match="impl: expected None, 'cpp' or 'reference', got 'cuda'"):
        adam_op.variance_correction(**lists, steps=[STEPS["adam"]], impl="cuda")
    if not extension.reason("cpu"):
        with pytest.raises(TypeError, match="impl='cpp': float32 and bfloat16 only"):
            adam_op.variance_correction(**lists, steps=[STEPS["adam"]], impl="cpp")


def test_past_2_31_elements_on_meta():
    big = torch.empty(3, 2**30, device="meta")
    lists = {k: [big] for k in STATE}
    got = adam_op.variance_correction(**lists, val_grads=[big.expand(2, -1, -1)], steps=[STEPS["adam"]])
    assert got.P[0].shape == (2, 3, 2**30) and got.sums.table.shape == (1, 4) and got.sums.table.device.type == "meta"


# ---- as ops of torch.library ----


def op_arguments(dtype=torch.float32):
    lists = draw([(3, 4), (5,)], dtype, K=2)
    table = torch.tensor([STEPS["amsgrad"]], dtype=torch.float64)
    out = [torch.zeros_like(x) for x in lists["val_grads"]]
    return [*(lists[k] for k in STATE), lists["val_grads"], out, table, [0, 0], "secant", False, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_opcheck(dtype):
    arguments = op_arguments(dtype)
    torch.library.opcheck(torch.ops.adam_ghost.variance_correction.default, arguments)
    buffers = [[torch.zeros_like(w) for w in arguments[0]], []]
    torch.library.opcheck(torch.ops.adam_ghost.weight_points.default, [*arguments[:5], *buffers, arguments[7], [0, 0], None])


@pytest.mark.parametrize("impl", IMPLS)
@steps
def test_foreseen_gradients_are_never_made(s, impl):
    """At what history lets expect of each gradient: the same as with these handed in, float64 of which is the yardstick."""
    s = s._replace(t=max(s.t, 2))
    lists = draw([(3, 5), (40000,), (), (7,)], K=2)
    lists["exp_avgs"][3] = lists["exp_avg_sqs"][3] = None  # without history nothing is expected
    state = zip(*(wide(lists)[k] for k in ("params", "exp_avgs", "exp_avg_sqs")), strict=True)
    expected = [definition.expected_gradient(s, *x) for x in state]
    assert all((g < 0).any() and (g > 0).any() for g in expected[:2]) and expected[3] is None
    steps = [s] * 4
    got = adam_op.variance_correction(**{**lists, "grads": [None] * 4}, steps=steps, foreseen=True, impl=impl)
    exact = adam_op.variance_correction(**wide({**lists, "grads": expected}), steps=steps, impl="reference")
    for P, want, val in zip(got.P, exact.P, lists["val_grads"], strict=True):
        assert (P - want).norm() <= 100 * EPS * (want.norm() + s.lr * val.norm())  # S is a difference, of terms of this size
    terms = [(P.unsqueeze(-1) * (0 if g is None else g.unsqueeze(-1))).abs().sum() for P, g in zip(exact.P, expected, strict=True)]
    assert ((got.sums.reached - exact.sums.reached).abs() <= 100 * EPS * torch.stack(terms)[:, None]).all()


def test_op_takes_absent_entries():
    arguments = op_arguments()
    arguments[2:5] = [[None, x[1]] for x in arguments[2:5]]
    torch.library.opcheck(torch.ops.adam_ghost.variance_correction.default, arguments)


def test_compiles_without_a_graph_break():
    lists = draw([(3, 4), (5,)])
    lr = torch.tensor(1e-3)

    def f(lists, lr):
        s = STEPS["adamw"]._replace(lr=lr)
        P, sums = adam_op.variance_correction(**lists, steps=[s, s])
        return P, sums.reached

    got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(lists, lr), f(lists, lr)
    for a, b in zip([*got[0], got[1]], [*want[0], want[1]], strict=True):
        torch.testing.assert_close(a, b)
