"""Which feedback windows take of a loss, and that one that does not hold is named: each against credit by retraining."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost
from adam_ghost.capture.calls import rng_state
from adam_ghost.processes.world import World
from adam_ghost.run.feedback import FEEDBACKS
from adam_ghost.run.rerun import Rerun
from adam_ghost.run.small_step import is_exact
from adam_ghost.run.suited import SuitedFeedback, bends
from adam_ghost.step.coverage import Coverage

N, D, C, BATCH, WINDOW, AHEAD = 60, 8, 3, 10, 4, 6
data = torch.Generator().manual_seed(5)
X = torch.randn(N, D, generator=data, dtype=torch.float64)
Y = torch.randint(0, C, (N,), generator=data)
X_VAL, Y_VAL = X[:20], Y[:20]


class Net(nn.Module):
    """A class of each sample, and its domain from features whose gradient is reversed."""

    def __init__(self, activation=F.gelu, reverse=lambda z: 2 * z.detach() - z, half=False, width=16):
        super().__init__()
        torch.manual_seed(1)
        self.activation, self.reverse, self.features = activation, reverse, nn.Linear(D, width)
        self.deeper, self.classes, self.domain = (nn.Linear(width, n) for n in (width, C, 2))
        self.to(torch.bfloat16 if half else torch.float64)

    def forward(self, x):
        z = self.activation(self.deeper(self.activation(self.features(x.to(self.domain.weight)))))
        return torch.cat([self.classes(z), self.domain(self.reverse(z))], 1)


def plain(model, x, y):
    return F.cross_entropy(model(x)[:, :C], y, reduction="none")


def focal(model, x, y):
    out = model(x)[:, :C]
    sure = out.softmax(-1).gather(1, y[:, None])[:, 0].detach()
    return (1 - sure) ** 2 * F.cross_entropy(out, y, reduction="none")


def reversed_domain(model, x, y):
    out = model(x)
    own = F.cross_entropy(out[:, :C], y, reduction="none")
    return own + 2 * F.cross_entropy(out[:, C:], (x[:, 0] > 0).long(), reduction="none")


def train(loss=plain, build=Net, feedback=None, weigh=None, unseen=None, before_step=None, scaler=None):
    """The validation loss after a training, in which sample ``weigh = (step, place)`` counts a little more or less; or of a run
    with ``feedback`` its first window's scores ``[WINDOW, BATCH]``. ``unseen(model)``: what the loop adds, train_loss does not.
    """
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    val_loss = lambda: F.cross_entropy(model(X_VAL)[:, :C], Y_VAL)  # noqa: E731
    train_loss = lambda batch: (loss(model, *batch[:2]) * batch[2]).mean()  # noqa: E731
    options = {"window": WINDOW, "ahead": AHEAD, "bounded": False, "every": 9, "train_loss": train_loss}
    run = adam_ghost.InRun(model, optimizer, val_loss, "window", feedback=feedback, **options) if feedback else None
    drawn = torch.Generator().manual_seed(9)
    for step in range(WINDOW + AHEAD):
        rows = torch.randperm(N, generator=drawn)[:BATCH]
        weights = torch.ones(BATCH, dtype=torch.float64)
        if weigh is not None and weigh[0] == step:
            weights[weigh[1]] += weigh[2]
        batch = X[rows], Y[rows], weights
        if run:
            run.batch([f"{step}.{i}" for i in range(BATCH)], inputs=batch)
        total = train_loss(batch) if unseen is None else train_loss(batch) + unseen(model)
        (total if scaler is None else scaler.scale(total)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if before_step is not None:
            before_step(model, step)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    if run is None:
        return float(val_loss().detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adam_ghost: the run ended")
        run.close()
    return torch.from_numpy(run.scores().total).view(-1, BATCH)[:WINDOW]


def retrained(every=7, **how):
    """Places of some samples in the first window, and their credit: the derivative by their weight, by training again."""
    places = [divmod(i, BATCH) for i in range(0, WINDOW * BATCH, every)]
    credit = [-(train(weigh=(*at, 1e-5), **how) - train(weigh=(*at, -1e-5), **how)) / 2e-5 for at in places]
    return places, torch.tensor(credit, dtype=torch.float64)


def error(scores, places, credit):
    found = torch.stack([scores[at] for at in places])
    return float((found - credit).norm() / credit.norm())


@pytest.mark.parametrize(
    "bend, name",
    [
        (F.relu, "Relu"),
        (F.leaky_relu, "LeakyRelu"),
        (F.hardtanh, "Hardtanh"),
        (F.hardswish, "Hardswish"),
        (F.selu, "Elu"),
        (nn.PReLU(), "PreluKernel"),
        (torch.abs, "Abs"),
        (lambda x: x.clamp(min=0), "Clamp"),
        (lambda x: x.amax(1), "Amax"),
        (lambda x: torch.maximum(x, -x), "Maximum"),
        (lambda x: F.max_pool1d(x[:, None], 2), "MaxPool2DWithIndices"),
        (lambda x: F.max_pool2d(x[:, None, None], (1, 2)), "MaxPool2DWithIndices"),
    ],
)
def test_kinks_are_told_by_the_graph(bend, name):
    assert name in bends(bend(torch.randn(3, 8, requires_grad=True)).sum())[0]


@pytest.mark.parametrize(
    "bend", [F.gelu, F.silu, F.elu, torch.tanh, F.softplus, lambda x: x.softmax(-1), lambda x: F.layer_norm(x, (8,))]
)
def test_smooth_functions_have_none(bend):
    x = torch.randn(3, 8, requires_grad=True)
    mixed = F.scaled_dot_product_attention(x[None], bend(x)[None], x[None])
    assert bends(F.cross_entropy(mixed[0], torch.tensor([0, 1, 2]))) == ([], [])


def auto_on_everything(model, world):
    """A feedback, and what it is called with after the step's number: kept batches, their gradient, a vector of ones."""
    rerun = Rerun(model, dict(model.named_parameters()), lambda batch: plain(model, *batch).mean(), world)
    batch = rerun.keep(range(N), (X, Y), None, rng_state(rerun.device))
    batch.scale = torch.ones(())
    ones = [torch.ones_like(p) for p in model.parameters()]
    return SuitedFeedback(rerun, "auto", Coverage(strict=False)), [batch], rerun.gradient([batch]), ones


def test_what_suits_is_looked_at_ever_more_rarely(monkeypatch):
    looked = []
    monkeypatch.setattr("adam_ghost.run.suited.bends", lambda loss: looked.append(loss) or ([], []))
    feedback, *given = auto_on_everything(Net(), World())
    at = []
    for sweep in range(1, 10):
        feedback.begin()
        before = len(looked)
        for k in (0, 1, 0, 1):
            feedback(sweep, *given, k)
        at += [sweep] * (len(looked) - before)
    assert at == [1, 2, 4, 8]


class _Sharded(World):
    sharded = True


def test_shards_are_never_differentiated_twice(monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setitem(FEEDBACKS, "double", refuse)
    feedback, *given = auto_on_everything(Net(F.relu, half=True), _Sharded())
    feedback.begin()
    with pytest.warns(UserWarning, match="weights of half precision"):
        product = feedback(1, *given)
    assert all(x.isfinite().all() for x in product)


def test_a_loss_with_kinks_is_differentiated_twice():
    bent = lambda: Net(F.relu)  # noqa: E731
    places, credit = retrained(build=bent)
    auto, double = (train(build=bent, feedback=way) for way in ("auto", "double"))
    assert torch.equal(auto, double) and error(auto, places, credit) < 1e-7
    with pytest.warns(UserWarning, match=r"the training loss has kinks \(Relu\)"):
        jumping = train(build=bent, feedback="differences")
    assert error(jumping, places, credit) > 10


def test_a_smooth_loss_keeps_the_cheaper_differences():
    auto, differences = (train(feedback=way) for way in ("auto", "differences"))
    assert torch.equal(auto, differences) and error(auto, *retrained()) < 5e-3


@adam_ghost.keeps_samples_apart
class _Once(torch.autograd.Function):
    """A function without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0] > 0)


def test_kinks_without_a_second_derivative_are_named():
    build = lambda: Net(lambda z: _Once.apply(F.relu(z)))  # noqa: E731
    with pytest.warns(UserWarning, match=r"has kinks \(Relu\).*second derivatives may end at custom functions \(_Once\)"):
        train(build=build, feedback="auto")


def test_a_detached_part_is_named_by_what_takes_it_for_constant():
    places, credit = retrained(loss=focal)
    assert error(train(loss=focal, feedback="auto"), places, credit) < 5e-3
    with pytest.warns(UserWarning, match="feedback='double' is .* away .* a part of the training loss is detached"):
        assert error(train(loss=focal, feedback="double"), places, credit) > 0.05


@adam_ghost.keeps_samples_apart
class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


@pytest.mark.parametrize("reverse", [lambda z: 2 * z.detach() - z, _Reversed.apply], ids=["detach", "function"])
def test_a_gradient_that_is_no_functions_is_named(reverse):
    """No feedback follows it, as docs/limits.md says."""
    how = {"loss": reversed_domain, "build": lambda: Net(reverse=reverse)}
    with pytest.warns(UserWarning, match="the training loss' gradient is no function's"):
        scores = train(feedback="auto", **how)
    assert error(scores, *retrained(**how)) > 0.2


@pytest.mark.parametrize("bend", [lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: x * (x > 0)], ids=["where", "mask"])
def test_kinks_that_no_name_tells_are_told_by_the_gradients(bend):
    build = lambda: Net(bend, width=64)  # noqa: E731
    auto, double = (train(build=build, feedback=way) for way in ("auto", "double"))
    assert torch.equal(auto, double) and error(auto, *retrained(build=build)) < 1e-7
    with pytest.warns(UserWarning, match="the training loss has kinks, and differences"):
        train(build=build, feedback="differences")


def test_weights_of_half_precision_are_not_moved_by_small_steps():
    build = lambda: Net(half=True)  # noqa: E731
    auto, double = (train(build=build, feedback=way) for way in ("auto", "double"))
    assert torch.equal(auto, double)
    with pytest.warns(UserWarning, match="weights of half precision move by a small step as rounding has it"):
        assert not torch.equal(train(build=build, feedback="differences"), double)


def test_a_small_part_that_train_loss_forgets_is_refused():
    """Differences of gradients would show it many times as large."""
    penalty = lambda model: 1e-4 * sum(p.square().sum() for p in model.parameters() if p.ndim > 1)  # noqa: E731
    with pytest.raises(ValueError, match=r"another gradient than the loop's backward pass \(.*% of the small difference"):
        train(feedback="auto", unseen=penalty)
    # of which a second derivative knows nothing as well, but nothing is divided by a small step
    found = train(feedback="double", unseen=penalty)
    assert error(found, *retrained(unseen=penalty)) < 0.05


def _norm(model):
    return nn.utils.get_total_norm([p.grad for p in model.parameters()])


def _scale(model, factor):
    for p in model.parameters():
        p.grad.mul_(factor)


@pytest.mark.parametrize(
    "before_step",
    [
        pytest.param(lambda model, step: _scale(model, 1 / _norm(model)), id="normalised"),
        pytest.param(
            lambda model, step: (_scale(model, 8), nn.utils.clip_grad_norm_(model.parameters(), 1.0)), id="grown, clipped"
        ),
    ],
)
def test_gradients_of_one_norm_are_followed(before_step):
    scores = train(feedback="double", before_step=before_step)
    assert error(scores, *retrained(before_step=before_step)) < 1e-5


def test_a_scaler_whose_gradients_are_clipped_in_some_steps():
    def clip(model, step):
        if step % 3 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)

    scores = train(feedback="double", before_step=clip, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert error(scores, *retrained(before_step=clip)) < 1e-5


def test_one_step_scaled_down_among_larger_gradients_is_named():
    with pytest.warns(UserWarning, match="step 3: its gradient was scaled down, alone among steps"):
        train(feedback="double", before_step=lambda model, step: _scale(model, 0.1) if step == 2 else None)


@pytest.mark.parametrize(
    "layer, products, exact",
    [(nn.Linear(3, 3), "matmul", False), (nn.Conv1d(3, 3, 1), "conv", False), (nn.Linear(3, 3), "conv", True)],
)
def test_rounded_products_are_not_exact(layer, products, exact):
    rerun = lambda layer: Rerun(layer, dict(layer.named_parameters()), lambda x: x, World())  # noqa: E731
    setting = getattr(torch.backends.mkldnn, products)
    assert is_exact(rerun(layer), [])
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        assert is_exact(rerun(layer), []) is exact
        assert is_exact(rerun(nn.Linear(3, 3).double()), [])
    finally:
        setting.fp32_precision = before
