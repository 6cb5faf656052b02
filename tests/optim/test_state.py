"""AdamState against what ``optimizer.step()`` really does, and its linearizations against naive formulas in float64."""

import copy
import itertools

import pytest
import torch
from oracles import close

from adam_ghost import AdamState
from adam_ghost.optim import adam_definition as definition
from adam_ghost.optim.adam_definition import StepScalars

KINDS = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
IMPLEMENTATIONS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "tensor-lr": {"lr": torch.tensor(3e-2, dtype=torch.float64)},
    "all": {"weight_decay": 0.3, "amsgrad": True, "maximize": True},
}


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in ((3, 4), (5,), ())]


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        # large and small in turn, so that amsgrad's maximum holds some elements and not others
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale * 3.0 ** (-seed)).to(p.dtype)


def optimizer(params, kind="AdamW", implementation="single", **options):
    return KINDS[kind](params, **{"lr": 3e-2, "betas": (0.8, 0.9)} | IMPLEMENTATIONS[implementation] | options)


def stepped(params, opt, scale):
    """The parameters after the optimizer's own step on ``scale`` times the gradient, on copies."""
    grads = [p.grad for p in params]  # which copies leave behind
    params, opt = copy.deepcopy((params, opt))
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale
    opt.step()
    return [p.detach() for p in params]


CASES = [
    pytest.param(kind, implementation, options, id=f"{kind}-{implementation}-{name}")
    for kind, implementation, (name, options) in itertools.product(KINDS, IMPLEMENTATIONS, OPTIONS.items())
    if (implementation, name) != ("foreach", "tensor-lr")  # which torch takes only where it is capturable, not on CPU
]


@pytest.mark.parametrize("kind, implementation, options", CASES)
def test_real_steps(kind, implementation, options):
    params = parameters()
    opt = optimizer(params, kind, implementation, **options)
    for step in range(4):
        give_gradients(params, step)
        state = AdamState.of(opt)
        empty, full = stepped(params, opt, 0.0), stepped(params, opt, 1.0)
        for p, e, f in zip(params, empty, full, strict=True):
            lr, sign = float(opt.param_groups[0]["lr"]), -1 if options.get("maximize") else 1
            close(state.empty_weights(p), e, 1e-13)
            close(state.weights(p, p.grad), f, 1e-13)
            close(state.mid_weights(p, p.grad), (e + f) / 2, 1e-13)
            rounding = 8 * torch.finfo(torch.float64).eps * (p.detach().abs() + lr) / lr  # of e - f, over lr
            assert ((state.update(p, p.grad) - state.update(p, None) - (e - f) / lr).abs() <= rounding).all()
            assert ((state.scaling(p, p.grad) - sign * (e - f) / lr / p.grad).abs() <= rounding / p.grad.abs()).all()
        opt.step()


def test_adam_with_decoupled_decay():
    params = parameters()
    opt = optimizer(params, "Adam", weight_decay=0.3, decoupled_weight_decay=True)
    give_gradients(params, 0)
    for p, w in zip(params, stepped(params, opt, 1.0), strict=True):
        close(AdamState.of(opt).weights(p, p.grad), w, 1e-13)


def naive_update(x, s, m, v, v_max):
    m, v = s.beta1 * m + (1 - s.beta1) * x, s.beta2 * v + (1 - s.beta2) * x**2
    v = v if v_max is None else torch.maximum(v, v_max)
    return m / (1 - s.beta1**s.t) / ((v / (1 - s.beta2**s.t)).sqrt() + s.eps)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_rules(kind, steps, options):
    params = parameters()
    opt = optimizer(params, kind, **options)
    for step in range(steps):
        give_gradients(params, step)
        opt.step()
    give_gradients(params, steps)
    state = AdamState.of(opt)
    for p in params:
        s, held = state[p].scalars, opt.state.get(p, {})
        m, v = (held.get(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq"))
        v_max = held.get("max_exp_avg_sq", torch.zeros_like(p)) if options.get("amsgrad") else None
        a = p.detach() * s.weight_decay if kind == "Adam" else torch.zeros_like(p)
        g = -p.grad if s.maximize else p.grad
        update = lambda x, held=(s, m, v, v_max): naive_update(x, *held)  # noqa: E731
        close(state.scaling(p, p.grad, "secant"), (update(a + g) - update(a)) / g, 1e-9)
        end = (a + g).clone().requires_grad_()
        tangent, parts = state.scaling(p, p.grad, "tangent"), 1 / g.abs()  # at t = 1 large parts all but cancel
        assert ((tangent - torch.autograd.grad(update(end).sum(), end)[0]).abs() <= 1e-13 * parts).all()
        h = 1e-5 * g.abs()
        assert ((tangent - (update(a + g + h) - update(a + g - h)) / (2 * h)).abs() <= 1e-8 * parts).all()
        before = (v if v_max is None else v_max) / (1 - s.beta2**steps if steps else 1.0)
        close(state.scaling(p, p.grad, "frozen"), (1 - s.beta1) / (1 - s.beta1 ** (steps + 1)) / (before.sqrt() + s.eps), 1e-12)
        assert torch.equal(state.scaling(p, p.grad, "sgd"), torch.ones_like(p))


def test_groups_have_their_own_hyperparameters():
    params = parameters()
    groups = [{"params": params[:1], "lr": 0.5, "betas": (0.1, 0.2)}, {"params": params[1:], "weight_decay": 0.7, "eps": 1e-2}]
    opt = torch.optim.AdamW(groups, lr=1e-2)
    for step in range(2):
        give_gradients(params, step)
        for p, w in zip(params, stepped(params, opt, 1.0), strict=True):
            close(AdamState.of(opt).weights(p, p.grad), w, 1e-13)
        opt.step()


def test_parameters_with_and_without_state():
    params = parameters()
    opt = optimizer(params)
    give_gradients(params, 0)
    params[1].grad = None
    opt.step()
    give_gradients(params, 1)
    for p, w in zip(params, stepped(params, opt, 1.0), strict=True):
        close(AdamState.of(opt).weights(p, p.grad), w, 1e-13)


def test_reading_changes_nothing():
    params = parameters()
    opt = optimizer(params)
    give_gradients(params, 0)
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    state = AdamState.of(opt)
    assert AdamState.of(state) is state and all(p in state for p in params) and len(list(state.parameters())) == 3
    for rule in definition.RULES:
        state.scaling(params[0], params[0].grad, rule)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, held in before["state"].items():
        assert all(torch.equal(x, after["state"][i][k]) for k, x in held.items())


SIZES = [0.0, 1e-45, 1e-42, 1e-38, 1e-30, 1e-20, 1e-8, 1.0, 1e6, 1e15]  # the first of float32's are denormal


@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["plain", "L2"])
@pytest.mark.parametrize("rule", definition.RULES)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_first_steps_in_float32(t, rule, decay):
    """Where v is zero, or was touched by one tiny gradient: finite, and as in float64 up to rounding."""
    g, v, w = (x.flatten() for x in torch.meshgrid(*[torch.tensor(SIZES)] * 2, torch.tensor([0.0, 1.0]), indexing="ij"))
    v = torch.zeros_like(v) if t == 1 else (1 - 0.999) * v.clamp(max=1e15) ** 2
    m = torch.zeros_like(v) if t == 1 else 0.1 * (v / (1 - 0.999)).sqrt()
    s = StepScalars(t, 1e-3, 0.9, 0.999, 1e-8, decay)
    got = definition.scaling(rule, s, w, g, m, v)
    want = definition.scaling(rule, s, *(x.double() for x in (w, g, m, v)))
    assert got.isfinite().all()
    # each of about ten roundings may be amplified by the difference in the numerator, whose parts are bounded by these
    parts = (1 - s.beta1) / s.bc1 / (v.double() / s.bc2).sqrt().add(s.eps)
    assert ((got - want).abs() <= 32 * torch.finfo(torch.float32).eps * (want.abs() + parts)).all()


def test_half_precision_parameters_are_computed_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        params = parameters(dtype)
        opt = optimizer(params)
        give_gradients(params, 0)
        opt.step()
        assert AdamState.of(opt).scaling(params[0], params[0].grad).dtype == torch.float32


@pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adamax])
def test_other_optimizers_are_refused(other):
    with pytest.raises(TypeError, match=other.__name__):
        AdamState.of(other([torch.zeros(1, requires_grad=True)], lr=0.1))


def test_subclass_that_steps_differently_is_refused():
    class Other(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    class Same(torch.optim.AdamW):
        pass

    params = [torch.zeros(1, requires_grad=True)]
    with pytest.raises(TypeError, match="Other"):
        AdamState.of(Other(params))
    assert params[0] in AdamState.of(Same(params))


@pytest.mark.parametrize("change", ["a step", "state loaded", "state replaced", "a parameter added", "another rate"])
def test_what_an_optimizer_holds_is_seen_whenever_it_is_read(change):
    params = parameters()
    opt = optimizer(params[:2] if change == "a parameter added" else params)
    for k in range(2):
        give_gradients(params, k)
        opt.step()
        AdamState.of(opt)
    if change == "a step":
        opt.step()
    elif change == "state loaded":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif change == "state replaced":
        opt.state[params[1]]["exp_avg"] = torch.ones(5, dtype=torch.float64)
    elif change == "a parameter added":
        opt.add_param_group({"params": params[2:], "lr": 1.0})
    else:
        opt.param_groups[0]["lr"] = 0.5
    read = AdamState.of(opt)
    held = [p for group in opt.param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(read.parameters(), held, strict=True))
    for group in opt.param_groups:
        for p in group["params"]:
            row, state = read[p], opt.state.get(p, {})
            assert row.param is p and p in read
            assert row.exp_avg is state.get("exp_avg") and row.exp_avg_sq is state.get("exp_avg_sq")
            assert row.scalars.t == float(state.get("step", 0)) + 1 and row.scalars.lr == group["lr"]
