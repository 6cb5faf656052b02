"""What a run meets beside plain loops: freezing, second passes, other runs on the model, models that it cannot follow."""

import gc
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

N = 4
SCHEDULES = pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])


def data(seed, n=N):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)


def loss_of(model, step, n=N):
    x, y = data(step, n)
    return F.cross_entropy(model(x), y)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def run_of(model, optimizer=None, schedule="midpoint", **options):
    optimizer = optimizer or torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return optimizer, ag.InRun(model, optimizer, lambda: loss_of(model, 99, 8), schedule, **options)


def one_step(run, model, optimizer, step, ids=range(N)):
    run.batch(ids)
    loss_of(model, step).backward()
    optimizer.step()
    optimizer.zero_grad()


@SCHEDULES
def test_freezing_and_unfreezing_are_followed(schedule):
    """The books add up in every phase, and a layer that was frozen at the beginning is attributed when it is trained."""
    model = mlp()
    model[2].requires_grad_(False)
    optimizer, run = run_of(model, schedule=schedule, strict=True)
    for step in range(36):
        if step == 12:
            model[2].requires_grad_(True)
            optimizer.add_param_group({"params": model[2].parameters()})
        if step == 24:
            model[0].requires_grad_(False)
        one_step(run, model, optimizer, step)
    assert len(run.steps) == 36 and all(s.coverage == 1 for s in run.steps)
    for s in run.steps:
        np.testing.assert_allclose(s.score_sum, s.total, rtol=1e-3, atol=1e-7)
    run.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_freezing_that_cannot_be_followed_is_named():
    model = mlp()
    model[2].requires_grad_(False)
    optimizer, run = run_of(model)
    one_step(run, model, optimizer, 0)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not hold 2.weight, 2.bias.*add_param_group"):
        run.batch(range(N))
    model[2].requires_grad_(False)
    run.batch(range(N))
    model[0].requires_grad_(False)
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"frozen or unfrozen between run.batch and the step: 0.weight, 0.bias"):
        optimizer.step()
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    run.batch(range(N))
    loss_of(model, 1).backward()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"between two micro-batches of a step: 0.weight"):
        run.batch(range(N))


def test_a_frozen_parameter_that_the_optimizer_moves():
    model = mlp()
    optimizer, run = run_of(model)
    one_step(run, model, optimizer, 0)
    loss_of(model, 0).backward()
    held = model[0].weight.grad
    optimizer.zero_grad()
    model[0].weight.requires_grad_(False)
    model[0].weight.grad = held
    run.batch(range(N))
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"'0.weight' is frozen but has a .grad"):
        optimizer.step()


def test_parameters_that_came_after_the_run():
    model = mlp()
    optimizer, run = run_of(model)
    one_step(run, model, optimizer, 0)
    model.append(nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[5].parameters()})
    run.batch(range(N))
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match=r"new parameters since the run was built: 5.weight, 5.bias"):
        optimizer.step()


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(input=torch.tanh(self.first(input=x)))


@SCHEDULES
def test_layers_that_are_called_by_keyword(schedule):
    model = ByKeyword()
    optimizer, run = run_of(model, schedule=schedule, strict=True)
    for step in range(14):
        one_step(run, model, optimizer, step)
    assert len(run.steps) == 14
    for s in run.steps:
        np.testing.assert_allclose(s.score_sum, s.total, rtol=1e-3, atol=1e-7)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.lstm(x.unsqueeze(-1))[0][:, -1])


@pytest.mark.parametrize("restored", ["copied", "replaced"])
def test_a_second_pass_at_other_weights(restored):
    """SAM: right where no replay needs the weights, refused where one would."""
    for model, right in ((nn.Linear(5, 3), True), (Recurrent(), False)):
        optimizer, run = run_of(model, strict=True)
        loss_of(model, 0).backward()
        held = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5 * p.grad)
        optimizer.zero_grad()
        run.batch(range(N))
        loss_of(model, 0).backward()
        with torch.no_grad():
            for p, w in zip(model.parameters(), held, strict=True):
                if restored == "copied":
                    p.copy_(w)
                else:
                    p.data = w
        if right:
            optimizer.step()
            np.testing.assert_allclose(run.steps[0].score_sum, run.steps[0].total, rtol=1e-4)
        else:
            with pytest.raises(RuntimeError, match="weights of 'lstm' changed between its forward pass and the step"):
                optimizer.step()


def test_several_runs_on_one_model():
    model = mlp()
    optimizer, run = run_of(model)
    for part in (model, model[0]):
        with pytest.raises(ValueError, match=r"has an InRun already: close\(\) that one first"):
            run_of(part, optimizer)
    run.close()
    optimizer, run = run_of(model)
    one_step(run, model, optimizer, 0)


def test_a_run_that_is_deleted_leaves_nothing(tmp_path):
    model = mlp()
    optimizer, run = run_of(model, ledger=tmp_path / "run")
    one_step(run, model, optimizer, 0)
    gc.disable()
    try:
        del run
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    finally:
        gc.enable()
    loss_of(model, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    with ag.open_ledger(tmp_path / "run") as ledger:
        assert ledger.scores().num_rows == N
    optimizer, run = run_of(model)
    one_step(run, model, optimizer, 2)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def wrapped(name):
    """By its name only: the real one needs processes, or a package that is not here."""
    return type(name, (Wrapper,), {})(mlp())


class DTensor(torch.Tensor):
    pass


def sharded():
    model = mlp()
    model[0].weight = nn.Parameter(torch.randn(6, 5).as_subclass(DTensor))
    return model


def complex_model():
    model = mlp()
    model.extra = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.DataParallel(mlp()), "model is a DataParallel.*use DistributedDataParallel"),
        (lambda: wrapped("FullyShardedDataParallel"), r"model is a FullyShardedDataParallel.*\(FSDP1\).*use fully_shard"),
        (lambda: nn.Sequential(wrapped("DeepSpeedEngine")), "'0' of model is a DeepSpeedEngine.*use"),
        (lambda: wrapped("PipelineEngine"), "model is a PipelineEngine.*use"),
        (sharded, r"'0.weight' is a DTensor.*\(tensor parallel\).*use"),
        (complex_model, "'extra' is complex"),
    ],
)
def test_models_that_are_not_supported_are_refused_by_name(build, message):
    model = build()
    with pytest.raises(TypeError, match=message):
        run_of(model)
    with pytest.raises(TypeError, match=message):
        ag.LayerCache(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_adam_without_eps():
    model = mlp()
    with pytest.raises(ValueError, match="eps=0"):
        run_of(model, torch.optim.AdamW(model.parameters(), eps=0.0))


def test_before_the_first_step():
    _, run = run_of(mlp())
    assert run.top() == [] and run.top(harmful=True) == []
    assert run.scores().ids == []
    with pytest.raises(ValueError, match="value must be standardized or total, got 'share'"):
        run.top(value="share")
    with pytest.raises(ValueError, match=r"steps=\(11, 20\) needs a run with ledger="):
        run.top(steps=(11, 20))
    with pytest.raises(ValueError, match=r"what InRun.state_dict\(\) returned"):
        run.load_state_dict({})


@pytest.mark.parametrize("targets", [1, 2])
def test_scores_print_in_a_line(targets):
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    val_loss = lambda: loss_of(model, 99, 8) if targets == 1 else torch.stack([loss_of(model, k, 8) for k in (98, 99)])  # noqa: E731
    with ag.InRun(model, optimizer, val_loss) as run:
        assert repr(run.scores()) == "SampleScores(no samples)"
        for step in range(50):
            one_step(run, model, optimizer, step, [f"sample {4 * step + i}" for i in range(N)])
    text = repr(run.scores())
    assert len(text) < 200 and text.startswith("SampleScores(200 samples" + (" and 2 targets" if targets == 2 else ";"))
    assert all(repr(run.top(1, harmful=harmful)[0][0]) in text for harmful in (False, True))


class Eccentric(nn.Module):
    """Keeps state that is no buffer, and draws from every random stream."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5))
        self.calls, self.mean, self.moved, self.log, self.seen = 0, torch.zeros(5), torch.zeros(5), [], {"calls": 0}
        self.own = random.Random(3)

    def forward(self, x):
        self.calls += 1
        self.seen["calls"] += 1
        self.log.append(self.calls)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        with torch.no_grad():
            self.moved.mul_(0.5)
        noise = random.random() + np.random.rand() + self.own.random()
        return x @ self.weight * (1 + 0.1 * noise + 0.01 * self.calls) - 0.1 * self.mean


@pytest.mark.parametrize("schedule", [None, "midpoint", "gauss", "lookahead"])
def test_a_custom_layer_is_called_as_often_as_without(schedule):
    """To the bit, with the layer's own counters and streams; its scores are those of the numbers that it drew."""

    def train(schedule):
        random.seed(1)
        np.random.seed(2)
        torch.manual_seed(0)
        model = nn.Sequential(Eccentric(), nn.Linear(5, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

        def val_loss():
            x, y = data(random.randrange(1000) + np.random.randint(1000), 8)
            return F.cross_entropy(model(x), y)

        run = ag.InRun(model, optimizer, val_loss, schedule) if schedule else None
        for step in range(14):
            if run:
                run.batch(range(N))
            loss_of(model, step + random.randrange(3) + np.random.randint(3)).backward()
            optimizer.step()
            optimizer.zero_grad()
        layer = model[0]
        state = [layer.calls, layer.seen, layer.log, layer.mean.tolist(), layer.moved.tolist(), layer.own.getstate()]
        return model, [*state, random.getstate(), np.random.get_state()[1].tolist()], run

    plain, plain_state, _ = train(None)
    model, state, run = train(schedule)
    assert state == plain_state and state[0] == 14
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6 if schedule == "lookahead" else 0, atol=1e-7 if schedule == "lookahead" else 0)
    if run:
        for s in run.steps:
            np.testing.assert_allclose(s.score_sum, s.total, rtol=1e-3, atol=1e-6)


class TiedHead(nn.Module):
    """Gives hidden states; the loss multiplies them by the embedding's weight itself, as TRL does with a language model's head."""

    def __init__(self):
        super().__init__()
        self.tokens, self.layer = nn.Embedding(7, 5), nn.Linear(5, 5)

    def forward(self, ids):
        return torch.tanh(self.layer(self.tokens(ids)))


def test_a_weight_that_the_loss_uses_outside_of_the_model_is_named():
    torch.manual_seed(0)
    model = TiedHead()
    ids = torch.randint(0, 7, (N, 4))
    loss = lambda: F.cross_entropy((model(ids) @ model.tokens.weight.T).flatten(0, 1), ids.flatten())  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match=r"add up to .*part of the gradient, of tokens.weight, did not come from") as caught:
        run = ag.InRun(model, optimizer, loss)
        run.batch(range(N))
        loss().backward()
        optimizer.step()
    assert all(w.filename == __file__ for w in caught if "adam_ghost" in str(w.message))
    assert run.steps[0].coverage == 1  # every parameter has calls


@pytest.mark.parametrize("fallback", [True, False])
def test_a_head_that_only_the_loss_uses_is_not_covered(fallback):
    """A pass of the whole model has no part in its gradient, and cannot score it."""
    torch.manual_seed(0)
    model = TiedHead()
    model.head = nn.Parameter(torch.randn(7, 5))
    ids = torch.randint(0, 7, (N, 4))
    loss = lambda: F.cross_entropy((model(ids) @ model.head.T).flatten(0, 1), ids.flatten())  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="not attributed: head; the scores cover") as caught:
        run = ag.InRun(model, optimizer, loss, fallback=fallback)
        run.batch(range(N))
        loss().backward()
        optimizer.step()
    assert not any("forward-mode pass" in str(w.message) or "add up to" in str(w.message) for w in caught)
    assert run.steps[0].coverage == 1 - 35 / sum(p.numel() for p in model.parameters())
