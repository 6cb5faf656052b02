"""Several optimizers that share the parameters out: their steps together are scored as one optimizer's with as many groups."""

import copy

import pytest
import torch
from oracles import Problem, close, gradients_one_by_one, inner
from snapshots import everything, same
from torch import nn
from trainings import mlp, points, sample_losses

import adam_ghost as ag

N = 6
LR = (1e-2, 3e-2)


class Together:
    """As one, for the oracle, which steps on copies."""

    def __init__(self, *optimizers):
        self.optimizers = list(optimizers)

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def halves(model):
    params = list(model.parameters())
    return params[::2], params[1::2]


def two(model, **options):
    a, b = halves(model)
    return torch.optim.Adam(a, lr=LR[0], weight_decay=0.2, **options), torch.optim.AdamW(b, lr=LR[1], amsgrad=True, **options)


def one(model):
    """The same as one optimizer: two groups of Adam, of which the second decays its weights as AdamW does."""
    a, b = halves(model)
    adam_w = {"params": b, "lr": LR[1], "amsgrad": True, "weight_decay": 0.01, "decoupled_weight_decay": True}
    return torch.optim.Adam([{"params": a}, adam_w], lr=LR[0], weight_decay=0.2)


class Loop:
    """A training loop over one optimizer or several."""

    def __init__(self, make, schedule="midpoint", scaler=None, max_norm=None, order=1, **options):
        self.model = mlp()
        made = make(self.model)
        self.optimizers = list(made) if isinstance(made, tuple) else [made]
        self.scaler, self.max_norm, self.order, self.number = scaler, max_norm, order, 0
        given = self.optimizers if isinstance(made, tuple) else made
        if schedule == "window":
            options = {"window": 3, "ahead": 2, "bounded": False, "feedback": "double", "train_loss": self.train_loss} | options
        self.run = ag.InRun(self.model, given, self.val_loss, schedule, **options)

    def val_loss(self):
        x, y = points(900, 9)
        return sample_losses(self.model(x), y).mean()

    def train_loss(self, batch):
        return sample_losses(self.model(batch[0]), batch[1]).mean()

    def backward(self):
        batch = points(self.number, N)
        self.run.batch([f"{self.number}.{i}" for i in range(N)], inputs=batch)
        loss = self.train_loss(batch)
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.number += 1

    def finish(self):
        if self.scaler and self.scaler.is_enabled():
            for each in self.optimizers:
                self.scaler.unscale_(each)
        if self.max_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)

    def take(self):
        for each in self.optimizers[:: self.order]:
            if self.scaler:
                self.scaler.step(each)
            else:
                each.step()
            each.zero_grad()  # of its own, before the next one steps
        if self.scaler:
            self.scaler.update()

    def train(self, steps):
        for _ in range(steps):
            self.backward()
            self.finish()
            self.take()
        return self

    def scores(self):
        return torch.from_numpy(self.run.scores().total)


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize("order", [1, -1], ids=["first-first", "last-first"])
@pytest.mark.parametrize("options", [{}, {"max_norm": 0.3}, {"every": 2}], ids=["", "clipped", "every"])
@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead", "window"])
def test_is_as_one_with_groups(schedule, options, order):
    if schedule == "window" and "every" in options:
        options = {"every": 2, "window": 2}
    together = Loop(two, schedule, order=order, strict=True, **options).train(13)
    alone = Loop(one, schedule, strict=True, **options).train(13)
    together.run.close()
    alone.run.close()
    assert len(together.run.steps) == len(alone.run.steps) > 0
    close(together.scores(), alone.scores(), 1e-12)


def test_thin_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, val = torch.randn(2, N, 3, 5).double()
    case = Problem(model, (x,), (val,), optimizer=Together(*two(model))).warm().record()
    P = case.direction()
    expected = torch.stack([inner(P, g) for g in gradients_one_by_one(case)])
    optimizers = case.optimizer.optimizers
    before = [everything(model, each) for each in optimizers]
    close(ag.attribute(case.cache, optimizers), expected)
    close(ag.exact_shapley(case.cache, optimizers, permutations=4).values, expected, 0.05)
    assert ag.gram(case.cache, optimizers).shape == (N, N)
    for each, held in zip(optimizers, before, strict=True):
        same(everything(model, each), held)
    with pytest.raises(ValueError, match="rule must be one of secant, tangent, frozen, sgd"):
        ag.attribute(case.cache, optimizers, rule="exact")


def test_training_is_the_same_to_the_bit():
    attributed = Loop(two).train(4)
    plain = mlp()
    optimizers = two(plain)
    for number in range(4):
        x, y = points(number, N)
        sample_losses(plain(x), y).mean().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    for p, q in zip(attributed.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedulers_of_both():
    def rates(loop):
        return [
            torch.optim.lr_scheduler.ExponentialLR(each, gamma) for each, gamma in zip(loop.optimizers, (0.5, 0.8), strict=True)
        ]

    together, alone = Loop(two), Loop(one)
    lambdas = [lambda t: 0.5**t, lambda t: 0.8**t]
    of_one = torch.optim.lr_scheduler.LambdaLR(alone.optimizers[0], lambdas)
    of_two = rates(together)
    for _ in range(4):
        together.train(1)
        alone.train(1)
        for each in (*of_two, of_one):
            each.step()
    close(together.scores(), alone.scores(), 1e-12)
    assert together.run.steps[-1].lr == pytest.approx(alone.run.steps[-1].lr)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
def test_a_scaler_that_unscales_first(fused):
    scaler = lambda: torch.amp.GradScaler("cpu", init_scale=1024.0)  # noqa: E731
    scaled = Loop(lambda m: two(m, fused=fused), scaler=scaler()).train(4)
    close(scaled.scores(), Loop(one).train(4).scores(), 1e-12)


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("schedule", ["midpoint", "window"])
def test_a_scaler_that_unscales_late_is_refused(fused, schedule):
    loop = Loop(lambda m: two(m, fused=fused), schedule, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    loop.backward()
    late = r"gradients of one optimizer changed after another had begun.*scaler\.unscale_"
    with pytest.raises((RuntimeError, ValueError), match=late if schedule == "midpoint" else "scaled by different factors"):
        loop.take()
    assert not loop.run.scores().ids


def spoil(loop, which):
    """An infinite gradient, as an overflow leaves it."""
    params = [p for group in loop.optimizers[which].param_groups for p in group["params"]]
    params[0].grad.flatten()[0] = torch.inf


def resting_step(loop, which, how):
    """A step in which one optimizer rests: its gradients are not finite, and a scaler skips it, or it has none."""
    loop.backward()
    if how == "skipped":
        spoil(loop, which)
    else:
        loop.optimizers[which].zero_grad()
    loop.finish()
    loop.take()


def with_a_rest(schedule, which, how):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if how == "skipped" else None
    loop = Loop(two, schedule, scaler=scaler).train(2)
    resting_step(loop, which, how)
    loop.train(2)
    loop.run.close()
    return loop


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("schedule", ["midpoint", "window"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_scaler_that_skips_one(which, schedule, order):
    """The other's parameters alone move, and are scored: as where the one had no gradients."""
    skipped, cleared = (with_a_rest(schedule, which, how) for how in ("skipped", "cleared"))
    assert not any(s.skipped for s in skipped.run.steps)
    close(skipped.scores(), cleared.scores(), 1e-12)
    for p, q in zip(skipped.model.parameters(), cleared.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("which", [0, 1])
def test_an_optimizer_that_rests_without_gradients_has_no_part(which):
    loop = Loop(two).train(2)
    model, optimizers = copy.deepcopy((loop.model, loop.optimizers))
    for p in halves(model)[which]:
        p.requires_grad_(False)
    x, y = points(2, N)
    cache = ag.LayerCache(model, lambda: sample_losses(model(points(900, 9)[0]), points(900, 9)[1]).mean())
    with cache:
        sample_losses(model(x), y).mean().backward()
    want = ag.attribute(cache, optimizers[1 - which])
    resting_step(loop, which, "cleared")
    close(loop.scores()[-N:], want, 1e-12)


@pytest.mark.parametrize("how, error", [("cleared", "added or removed"), ("skipped", None)])
def test_foreseen_scores_are_of_all_parameters(how, error):
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0) if how == "skipped" else None
    loop = Loop(two, "lookahead", scaler=scaler).train(11)
    if error:
        with pytest.raises(ValueError, match=error):
            resting_step(loop, 1, how)
    else:
        resting_step(loop, 1, how)
        assert [s.skipped for s in loop.train(1).run.steps] == [False] * 11 + [True, False]


def test_gradients_that_change_between_the_two():
    loop = Loop(two)
    loop.backward()
    loop.optimizers[0].step()
    with torch.no_grad():
        for p in halves(loop.model)[1]:
            p.grad.mul_(2)
    with pytest.raises(RuntimeError, match="changed after another had begun the step"):
        loop.optimizers[1].step()


def test_bad_lists():
    model = mlp()
    a, b = two(model)
    with pytest.raises(ValueError, match="optimizer: optimizers 0 and 1 hold the same parameter, of shape"):
        ag.InRun(model, [a, torch.optim.AdamW(model.parameters())], lambda: None)
    with pytest.raises(ValueError, match=r"the optimizer does not hold 0.bias"):
        ag.InRun(model, [a], lambda: None)
    with pytest.raises(ValueError, match="optimizer must be an optimizer or a list of them, got an empty one"):
        ag.InRun(model, [], lambda: None)
    with pytest.raises(TypeError, match=r"optimizer\[1\] must be one of .*got dict"):
        ag.InRun(model, [a, b.state_dict()], lambda: None)


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead", "window"])
def test_an_optimizer_that_does_not_step_with_the_others_is_refused(schedule):
    loop = Loop(two, schedule)
    loop.backward()
    loop.optimizers[0].step()
    with pytest.raises(RuntimeError, match="step 1: AdamW did not step, but its parameters have gradients"):
        loop.backward()
    loop.run.close()
    assert len(loop.run.scores().ids) == 0  # the step was another one than was scored
