"""Every optimizer but Adam: its definition against what ``optimizer.step()`` really does, in float64.

The steps are taken on copies. Linearizations are compared with quotients of such steps, adjoints with differences of them.
"""

import copy
import inspect
import itertools

import pytest
import torch
from oracles import close
from torch.optim import _muon

from adam_ghost.optim import read_optimizer
from adam_ghost.optim.muon import ratio

pytestmark = pytest.mark.usefixtures("float64")

O = torch.optim
KINDS = {
    "SGD": (O.SGD, {"lr": 0.1}),
    "SGD-momentum": (O.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2}),
    "SGD-nesterov": (O.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True, "weight_decay": 0.2}),
    "RMSprop": (O.RMSprop, {"lr": 0.1, "alpha": 0.8}),
    "RMSprop-momentum": (O.RMSprop, {"lr": 0.1, "alpha": 0.8, "momentum": 0.7, "weight_decay": 0.2}),
    "RMSprop-centered": (O.RMSprop, {"lr": 0.1, "alpha": 0.8, "centered": True, "maximize": True, "weight_decay": 0.2}),
    "Adagrad": (O.Adagrad, {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.2}),
    "Adagrad-initial": (O.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.4, "maximize": True}),
    "Adamax": (O.Adamax, {"lr": 0.1, "betas": (0.8, 0.7)}),
    "Adamax-decay": (O.Adamax, {"lr": 0.1, "betas": (0.8, 0.7), "weight_decay": 0.2, "maximize": True, "eps": 0.05}),
    "NAdam": (O.NAdam, {"lr": 0.1, "betas": (0.8, 0.9)}),
    "NAdam-decay": (O.NAdam, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "maximize": True}),
    "NAdam-decoupled": (O.NAdam, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "RAdam": (O.RAdam, {"lr": 0.1, "betas": (0.8, 0.9)}),
    "RAdam-decay": (O.RAdam, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "maximize": True}),
    "RAdam-decoupled": (O.RAdam, {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "Adafactor": (O.Adafactor, {"lr": 0.1}),
    "Adafactor-decay": (O.Adafactor, {"lr": 2.0, "d": 1.2, "weight_decay": 0.2, "maximize": True, "eps": (1e-9, 1e-3)}),
    "Muon": (O.Muon, {"lr": 0.1}),
    "Muon-rms": (O.Muon, {"lr": 0.1, "nesterov": False, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}),
}
COUPLED = (O.Adafactor, O.Muon)
IMPLEMENTATIONS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
FUSED = (O.SGD, O.Adagrad)
CASES = [
    pytest.param(kind, options | how, id=f"{name}-{implementation}")
    for (name, (kind, options)), (implementation, how) in itertools.product(KINDS.items(), IMPLEMENTATIONS.items())
    if kind is not O.Muon and (implementation != "fused" or kind in FUSED)
] + [pytest.param(*KINDS[name], id=name) for name in KINDS if KINDS[name][0] is O.Muon]
DIFFERENTIABLE = {name: case for name, case in KINDS.items() if case[0] is not O.Muon}  # whose step runs in bfloat16
kinds = pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)


def made(kind, options):
    shapes = [(3, 4), (5, 2)] if kind is O.Muon else [(3, 4), (5,), (2, 3, 2), ()]
    params = [torch.randn(s).requires_grad_() for s in shapes]
    return params, kind(params, **options)


def give_gradients(params, step):
    for p in params:
        p.grad = torch.randn(p.shape) * 2.0**-step  # large and small in turn


def stepped(params, opt, scale=1.0):
    """The parameters after the optimizer's own step on ``scale`` times the gradient, on copies."""
    grads = [p.grad for p in params]  # which copies leave behind
    params, opt = copy.deepcopy((params, opt))
    for p, g in zip(params, grads, strict=True):
        p.grad = g * scale
    opt.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("kind, options", CASES)
def test_real_steps(kind, options):
    params, opt = made(kind, options)
    for step in range(8):  # RAdam's second moment is young until the sixth
        give_gradients(params, step % 3)
        state = read_optimizer(opt)
        grads = [p.grad for p in params]
        ends = stepped(params, opt, 0.0), stepped(params, opt)
        points = [[torch.empty_like(p) for p in params] for _ in range(2)]
        state.weight_points(params, grads, empty=points[0], mid=points[1])
        after = state.advanced(grads, state.scalars(params))
        for i, (e, f) in enumerate(zip(*ends, strict=True)):
            found = (state.weights(params[i], grads[i]), f), (points[0][i], e), (points[1][i], (e + f) / 2)
            for got, want in (*found, (list(after.parameters())[i], f)):
                assert (got - want).norm() <= 1e-13 * (params[i].norm() + want.norm())
        assert state.steps_taken(default=step) == step
        opt.step()


@kinds
def test_a_trajectory(kind, options):
    """``advanced`` from a kept state, step after step, with each step's own scalars, leads where the optimizer leads."""
    params, opt = made(kind, options)
    state, before = None, []
    for step in range(7):
        give_gradients(params, step % 3)
        if step == 4:
            params[0].grad = None
        read = read_optimizer(opt)
        scalars, grads = read.scalars(params), [p.grad for p in params]
        if step == 1:
            kept = read.kept(params)
            state = kept.rebuild(kept.tensors)
        elif state is not None:
            state = state.advanced(before, scalars)
            for x, y in zip(state.kept(list(state.parameters())).tensors, read.kept(params).tensors, strict=True):
                if y is None:
                    assert x is None or not x.any()
                elif y.any():
                    close(x, y, 1e-12)
        before = grads
        opt.step()


@pytest.mark.parametrize("steps", [0, 1, 7])
@kinds
def test_rules(kind, options, steps):
    params, opt = made(kind, options)
    for step in range(steps):
        give_gradients(params, step % 3)
        opt.step()
    give_gradients(params, steps % 3)
    state, grads = read_optimizer(opt), [p.grad for p in params]
    empty, full = stepped(params, opt, 0.0), stepped(params, opt)
    val = [torch.randn(2, *p.shape) for p in params]
    for rule in state.linearizations:
        found = state.linearize(params, grads, val, rule, [torch.empty_like(v) for v in val])
        totals = [(P * g).reshape(2, -1).sum(1) for P, g in zip(found.P, grads, strict=True)]
        close(found.total, sum(totals), 1e-12)
        history = [(v * (p.detach() - e)).reshape(2, -1).sum(1) for v, p, e in zip(val, params, empty, strict=True)]
        if sum(history).abs().max() > 1e-12:
            close(found.history, sum(history), 1e-10)
        for p, g, v, P, e, f in zip(params, grads, val, found.P, empty, full, strict=True):
            if rule == "secant":
                allowed = 8 * torch.finfo(torch.float64).eps * (p.detach().abs() + 1) / g.abs()  # rounding of e - f
                assert ((P - v * (e - f) / g).abs() <= allowed * v.abs() + 1e-12 * P.abs()).all()
            elif rule == "sgd":
                lr = opt.param_groups[0]["lr"] * (-1 if options.get("maximize") else 1)
                close(P, lr * v, 1e-15)
            elif rule == "path" and kind is not O.Muon and steps and p.numel() > 1:  # else the step is nearly the gradient's sign
                reached = (v * (e - f)).reshape(2, -1).sum(1)
                close((P * g).reshape(2, -1).sum(1), reached, 1e-2)
    if "secant" in state.linearizations:
        D = [state.metric(p, g) for p, g in zip(params, grads, strict=True)]
        signed = [-d if options.get("maximize") else d for d in D]
        secant = state.linearize(
            params, grads, [torch.ones_like(p) for p in params], "secant", [torch.empty_like(p) for p in params]
        )
        assert all(torch.equal(d, P) for d, P in zip(signed, secant.P, strict=True))
    else:
        with pytest.raises(TypeError, match="couples the elements"):
            state.metric(params[0], grads[0])


def difference_quotients(params, opt, i, names, function, h=1e-6):
    """The derivatives of ``function`` of weights and state after a step of parameter ``i``, by those before it and the gradient."""
    found = []
    for name in ("w", "g", *names):
        at = params[i].data if name == "w" else params[i].grad if name == "g" else opt.state[params[i]].get(name)
        if at is None:
            found.append(None)
            continue
        quotient = torch.empty(at.shape)
        for place in range(at.numel()):
            ends = []
            for sign in (1, -1):
                grads = [p.grad.clone() for p in params]
                ps, o = copy.deepcopy((params, opt))
                for p, g in zip(ps, grads, strict=True):
                    p.grad = g
                x = ps[i].data if name == "w" else ps[i].grad if name == "g" else o.state[ps[i]][name]
                x.view(-1)[place] += sign * h
                o.step()
                ends.append(function(ps[i].detach(), [o.state[ps[i]].get(k) for k in names]))
            quotient.view(-1)[place] = (ends[0] - ends[1]) / (2 * h)
        found.append(quotient)
    return found


STATE = {
    O.SGD: ["momentum_buffer"],
    O.RMSprop: ["square_avg", "grad_avg", "momentum_buffer"],
    O.Adagrad: ["sum"],
    O.Adamax: ["exp_avg", "exp_inf"],
    O.NAdam: ["exp_avg", "exp_avg_sq"],
    O.RAdam: ["exp_avg", "exp_avg_sq"],
    O.Adafactor: ["row_var", "col_var"],
}


@pytest.mark.parametrize("which", [0, 1], ids=["matrix", "vector"])
@pytest.mark.parametrize(
    "kind, options", [v for v in KINDS.values() if v[0] is not O.Muon], ids=[k for k in KINDS if "Muon" not in k]
)
def test_adjoint_is_the_derivative_of_the_real_step(kind, options, which):
    params, opt = made(kind, options)
    for step in range(6):
        give_gradients(params, step % 3)
        opt.step()
    give_gradients(params, 0)
    names = STATE[kind]
    if kind is O.Adafactor and which == 1:
        names = ["variance", "none"]
    state, grads = read_optimizer(opt), [p.grad for p in params]
    adjoint = state.adjoint([torch.randn(2, *p.shape) for p in params])
    for entries in adjoint.state:
        for x in entries:
            x.normal_()
    lambdas = [adjoint.weights[which].clone(), *(entries[which].clone() for entries in adjoint.state)]

    def function(k):
        def of(w, held):
            total = (lambdas[0][k] * w).sum()
            for x, y in zip(lambdas[1:], held, strict=True):
                total = total + (0 if y is None else (x[k] * y).sum())
            return total

        return of

    pulled = state.pull(grads, adjoint)
    found = [adjoint.weights[which], pulled[which], *(entries[which] for entries in adjoint.state)]
    for k in range(2):
        for x, want in zip(found, difference_quotients(params, opt, which, names, function(k)), strict=True):
            if want is not None:
                assert (x[k] - want).norm() <= 1e-7 * (want.norm() + 1)


@pytest.mark.parametrize("kind, options", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_bounded_where_the_derivative_says_nothing(kind, options):
    """Elements without a history or a gradient: a sample's share of 1 bounds the derivative; with none it is the derivative."""
    params, opt = made(kind, options | {"weight_decay": 0.0})
    for p in params:
        p.grad = torch.zeros(p.shape)
    opt.step()
    opt.step()
    state, grads = read_optimizer(opt), [p.grad for p in params]

    def pulled(size):
        shares = [torch.tensor(size) for _ in params] if size is not None else None
        return state.pull(grads, state.adjoint([torch.ones(1, *p.shape) for p in params]), shares)

    plain, at_zero, bounded = pulled(None), pulled(0.0), pulled(1.0)
    for p, x, y, z in zip(params, plain, at_zero, bounded, strict=True):
        assert torch.equal(x, y)
        assert z.abs().max() <= 5 * max(1.0, options["lr"]) * max(1.0, float(p.detach().norm()))


def test_path_is_the_integral_of_the_derivative():
    """Of Adafactor's real step, by differences at many points of the gradient's path."""
    params, opt = made(O.Adafactor, {"lr": 0.1})
    for _ in range(5):
        give_gradients(params, 0)
        opt.step()
    give_gradients(params, 0)
    grads, val = [p.grad for p in params], [torch.randn_like(p) for p in params]
    state = read_optimizer(opt)
    found = state.linearize(params, grads, val, "path", [torch.empty_like(v) for v in val])
    points, whole = 16, [torch.zeros_like(p) for p in params[:2]]
    for k in range(points):
        for i, total in enumerate(whole):
            for p, g in zip(params, grads, strict=True):
                p.grad = g * (k + 0.5) / points
            loss = lambda w, _, i=i: -(val[i] * w).sum()  # noqa: E731
            total += difference_quotients(params, opt, i, [], loss)[1] / points
    for P, want in zip(found.P, whole, strict=False):
        close(P, want, 0.02)


def orthogonalized(x, steps=5, a=3.4445, b=-4.775, c=2.0315):
    """Muon's iterations as what they do to singular values."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_differentiated_in_full_precision(nesterov):
    p = torch.randn(5, 3, requires_grad=True)
    opt = O.Muon([p], lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=nesterov)
    for _ in range(30):
        give_gradients([p], 0)
        opt.step()
    give_gradients([p], 2)  # smaller: a path that is smooth between the points
    buffer, state = opt.state[p]["momentum_buffer"].clone(), read_optimizer(opt)

    def step(w, g, buffer):
        buffer = 0.9 * buffer + 0.1 * g
        update = orthogonalized(0.1 * g + 0.9 * buffer if nesterov else buffer)
        return w * (1 - 0.1 * 0.2) - 0.1 * (5 / 3) ** 0.5 * update, buffer

    apart = state.weights(p, p.grad) - step(p.detach(), p.grad, buffer)[0]
    assert apart.abs().max() <= 0.1 * 0.1  # bfloat16's rounding, of lr, through five iterations
    adjoint = state.adjoint([torch.randn(2, 5, 3)])
    adjoint.state[0][0].normal_()
    lambdas = adjoint.weights[0].clone(), adjoint.state[0][0].clone()
    (pulled,) = state.pull([p.grad], adjoint)
    _, pull = torch.func.vjp(step, p.detach(), p.grad, buffer)
    for got, want in zip((adjoint.weights[0], pulled, adjoint.state[0][0]), torch.func.vmap(pull)(lambdas), strict=True):
        close(got, want, 1e-10)

    val, P = torch.randn(5, 3), torch.zeros(5, 3)
    for k in range(200):
        _, pull = torch.func.vjp(lambda g: -step(p.detach(), g, buffer)[0], p.grad * (k + 0.5) / 200)
        P += pull(val)[0] / 200
    close(state.linearize([p], [p.grad], [val], "path", [torch.empty(5, 3)]).P[0], P, 0.02)


@pytest.mark.parametrize("shape", [(6, 3), (3, 6)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", [None, "original", "match_rms_adamw", "spectral_unclamped"])
def test_muons_rate_follows_the_shape_as_torch_has_it(kind, shape):
    rows, columns = shape
    known = {"match_rms_adamw": 0.2 * max(shape) ** 0.5, "spectral_unclamped": (rows / columns) ** 0.5}
    assert ratio(kind, torch.Size(shape)) == pytest.approx(known.get(kind, max(1, rows / columns) ** 0.5))
    if kind != "spectral_unclamped" or kind in inspect.getsource(_muon):
        assert ratio(kind, torch.Size(shape)) == pytest.approx(_muon._adjust_lr(1.0, kind, torch.Size(shape)))


def test_a_rate_of_muons_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="Muon's adjust_lr_fn='cubic' is not known"):
        ratio("cubic", torch.Size((2, 3)))
