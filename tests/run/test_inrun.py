"""InRun in real loops: its scores are those of the very gradient that the optimizer used, and training stays what it was.

The oracle recomputes each sample's share of the loss under the same random numbers and differentiates it alone.
"""

import copy
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adam_ghost as ag
from adam_ghost import AdamState
from adam_ghost.demo.model import GPT
from adam_ghost.step.direction import form_direction, validation_gradient
from adam_ghost.step.validation import Validation

VOCABULARY, CONTEXT, N = 19, 8, 6
TOGETHER = pytest.param("lookahead", marks=pytest.mark.together, id="lookahead together")
SCHEDULES = pytest.mark.parametrize("schedule", ["midpoint", "lookahead", TOGETHER])


def gpt(dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    return GPT(VOCABULARY, CONTEXT, 2, 16, 2, dropout).to(dtype)


def tokens(n=N, length=CONTEXT + 1, seed=1):
    return torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def mean_shares(model, x):
    """[n]: each sample's share of the mean loss."""
    losses = F.cross_entropy(model(x[:, :-1]).mT, x[:, 1:], reduction="none")
    return losses.mean(1) / len(x)


def val_loss(model):
    return mean_shares(model.eval(), tokens(4, seed=9)).sum()


def with_history(model, optimizer):
    """The optimizer as after a hundred steps, so that lookahead has a past to look at."""
    torch.manual_seed(3)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-2 if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"] += 100
    return optimizer


class Loop:
    """A training loop with InRun, and beside it, per step, the oracle's scores."""

    def __init__(self, model, schedule="midpoint", val=val_loss, scaler=None, optimizer=None, **options):
        self.model, self.schedule, self.scaler = model, schedule, scaler
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or torch.optim.AdamW(params, lr=3e-3)
        self.val = partial(val, model)
        self.oracle_model = model
        if schedule == "lookahead":
            with_history(model, self.optimizer)
        self.expected, self.shares, self.factor = [], [], 1.0
        self.optimizer.register_step_pre_hook(self.oracle)
        self.run = ag.InRun(model, self.optimizer, self.val, schedule, **options)

    def backward(self, shares, ids, offsets=None, **context):
        seed = len(self.shares)
        self.run.batch(ids, offsets)
        torch.manual_seed(seed)
        loss = shares(self.model).sum()
        (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.shares.append((shares, seed, ids))

    def step(self):
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.shares = []

    def oracle(self, optimizer, args, kwargs):
        params = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        twins = [q for p, q in zip(self.model.parameters(), self.oracle_model.parameters(), strict=True) if p.grad is not None]
        factor = getattr(optimizer, "grad_scale", 1.0)
        grads = {name: p.grad / factor for name, p in params.items()}  # which a fused step unscales itself
        if getattr(optimizer, "found_inf", torch.zeros(1)).any():
            return
        # what the oracle runs is not the loop's
        recorder = getattr(self.run._schedule, "recorder", None)
        recording, recorder.recording = recorder.recording, None
        if self.schedule != "lookahead":
            state = AdamState.of(optimizer)
            run = Validation(self.val, self.model)
            val = validation_gradient(state, params, grads, run, self.schedule)
            P = form_direction(state, params, grads, val, "secant").P
        else:
            P = {k: x.clone() for k, x in self.run._schedule._direction.P.items()}
        found = {}
        with torch.random.fork_rng():
            for shares, seed, ids in self.shares:
                torch.manual_seed(seed)
                with torch.enable_grad():
                    parts = shares(self.oracle_model.train())
                for i, part in zip(ids, parts, strict=True):
                    gs = torch.autograd.grad(part, twins, retain_graph=True, allow_unused=True)
                    score = sum((P[name] * g).sum() for name, g in zip(params, gs, strict=True) if g is not None)
                    found[i] = found.get(i, 0.0) + float(score * self.factor)
        recorder.recording = recording
        self.expected.append(found)

    def check(self, tolerance=1e-10):
        got = self.run.scores()
        want = {}
        for step in self.expected:
            for i, s in step.items():
                want[i] = want.get(i, 0.0) + s
        assert got.ids == list(want)
        np.testing.assert_allclose(got.total, list(want.values()), atol=tolerance * np.linalg.norm(list(want.values())), rtol=0)


@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead", TOGETHER])
def test_plain(schedule):
    loop = Loop(gpt(), schedule)
    for step in range(4):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        loop.step()
    loop.check()
    assert [s.step for s in loop.run.steps] == [1, 2, 3, 4]
    for s in loop.run.steps:
        np.testing.assert_allclose(s.score_sum, s.total, rtol=1e-9)


@SCHEDULES
def test_accumulation_over_micro_batches_of_different_sizes(schedule):
    loop = Loop(gpt(), schedule)
    for step in range(3):
        for k, n in enumerate((4, 1, 3)):
            loop.backward(
                lambda m, n=n, k=k, s=step: mean_shares(m, tokens(n, seed=10 * s + k)) / 3, [f"{k}.{i}" for i in range(n)]
            )
        loop.step()
    loop.check()


@SCHEDULES
@pytest.mark.parametrize("how", ["clip", "scale"])
def test_gradient_scaled_between_backward_and_step(schedule, how):
    loop = Loop(gpt(), schedule)
    for step in range(3):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        if how == "clip":
            norm = nn.utils.clip_grad_norm_(loop.model.parameters(), 0.05)
            loop.factor = float(min(1.0, 0.05 / (norm + 1e-6)))
            assert loop.factor < 0.5
        else:
            loop.factor = 0.25
            for p in loop.model.parameters():
                p.grad = p.grad * 0.25
        loop.step()
    loop.check()


@SCHEDULES
@pytest.mark.parametrize("fused", [False, True], ids=["unscale", "fused"])
def test_grad_scaler_and_its_skipped_step(schedule, fused):
    model = gpt(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6)
    loop = Loop(model, schedule, scaler=scaler, optimizer=optimizer)
    for step in range(4):
        bad = step == 2
        before = [p.detach().clone() for p in model.parameters()]

        def shares(m, step=step, bad=bad):
            parts = mean_shares(m, tokens(seed=step))
            return parts * float("inf") if bad else parts

        loop.backward(shares, range(N))
        loop.step()
        assert bad == all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loop.check(1e-4)
    assert [s.skipped for s in loop.run.steps].count(True) == 1


@SCHEDULES
def test_autocast_bf16(schedule):
    loop = Loop(gpt(dtype=torch.float32), schedule)

    def shares(m, seed):
        with torch.autocast("cpu", torch.bfloat16):
            return mean_shares(m, tokens(seed=seed)).float()

    for step in range(3):
        loop.backward(partial(shares, seed=step), range(N))
        loop.step()
    loop.check(0.02)  # the gradients themselves are rounded to 8 bits
    for s in loop.run.steps:
        np.testing.assert_allclose(s.score_sum, s.total, rtol=0.05)


class Branches(nn.Module):
    """Groups, a frozen part, a branch that some steps skip, and a layer called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.frozen = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False)
        self.sometimes, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.use = True

    def forward(self, x):
        x = self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))
        x = torch.tanh(self.frozen(x))
        return self.last(x + self.sometimes(x) if self.use else x)


def classify(model, seed, n=N):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)
    return F.cross_entropy(model(x), y, reduction="none") / n


@SCHEDULES
@pytest.mark.parametrize("to_none", [True, False], ids=["none", "zeros"])
def test_groups_scheduler_frozen_and_absent_gradients(schedule, to_none):
    torch.manual_seed(0)
    model = Branches().double()
    biases = [p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad]
    weights = [p for name, p in model.named_parameters() if name.endswith("weight") and p.requires_grad]
    optimizer = torch.optim.Adam([{"params": weights, "weight_decay": 0.1, "lr": 1e-2}, {"params": biases, "betas": (0.5, 0.9)}])
    schedule_lr = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    loop = Loop(model, schedule, val=lambda m: classify(m, 99).sum(), optimizer=optimizer)
    for step in range(4):
        model.use = step % 2 == 0
        loop.backward(partial(classify, seed=step), range(N))
        loop.optimizer.step()
        schedule_lr.step()
        optimizer.zero_grad(set_to_none=to_none)
        loop.shares = []
    loop.check()
    assert [s.lr[0] for s in loop.run.steps] == [1e-2, 5e-3, 2.5e-3, 1.25e-3]


def masked_shares(model, x):
    """[n]: shares of a loss that is the mean over all unmasked tokens of the batch, of samples of different lengths."""
    y = x[:, 1:].clone()
    for i in range(len(x)):
        y[i, i + 2 :] = -100
    losses = F.cross_entropy(model(x[:, :-1]).mT, y, reduction="none", ignore_index=-100)
    return losses.sum(1) / (y != -100).sum()


@SCHEDULES
def test_masked_tokens_and_token_mean(schedule):
    loop = Loop(gpt(), schedule)
    for step in range(2):
        loop.backward(partial(masked_shares, x=tokens(seed=step)), range(N))
        loop.step()
    loop.check()


class Packed(nn.Module):
    """Tokens of several samples in a row, no attention across samples: positions restart."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 12), nn.Embedding(CONTEXT, 12)
        self.norm, self.up, self.head = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, VOCABULARY)

    def forward(self, ids, positions):
        return self.head(F.gelu(self.up(self.norm(self.tokens(ids) + self.positions(positions)))))


@SCHEDULES
def test_samples_packed_in_rows(schedule):
    torch.manual_seed(0)
    lengths = [3, 1, 7, 5, 4]  # 20 tokens in 2 rows of 10; the third sample runs over the row's end
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    positions = torch.cat([torch.arange(k) for k in lengths]).view(2, 10)

    def shares(model, seed):
        x = tokens(2, 11, seed)
        losses = F.cross_entropy(model(x[:, :-1], positions).mT, x[:, 1:], reduction="none").flatten() / 20
        return torch.stack([part.sum() for part in losses.split(lengths)])

    loop = Loop(Packed().double(), schedule, val=lambda m: shares(m, 77).sum())
    for step in range(3):
        loop.backward(partial(shares, seed=step), list("abcde"), offsets)
        loop.step()
    loop.check()


class Checkpointed(GPT):
    reentrant = False

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


@SCHEDULES
@pytest.mark.parametrize("reentrant", [False, True], ids=["nonreentrant", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing(schedule, reentrant, dropout):
    torch.manual_seed(0)
    model = Checkpointed(VOCABULARY, CONTEXT, 2, 16, 2, dropout).double()
    model.reentrant = reentrant
    loop = Loop(model, schedule)
    if reentrant:  # which cannot be differentiated for one sample alone: the oracle differentiates the same model without
        plain = gpt(dropout)
        loop.oracle_model = plain
    for step in range(2):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        loop.oracle_model.load_state_dict(model.state_dict())
        loop.step()
    loop.check()


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++").split()[0]), reason="torch.compile found no C++ compiler")
@pytest.mark.filterwarnings("ignore:adam_ghost. step 1 has no scores")
def test_compiled_model_in_lookahead():
    model = GPT(VOCABULARY, CONTEXT, 1, 16, 2).double()
    compiled = torch.compile(model, fullgraph=True)  # a graph break is an error
    loop = Loop(compiled, "lookahead")
    loop.oracle_model = copy.deepcopy(model)  # compiled graphs cannot be differentiated twice
    with pytest.warns(UserWarning, match=r"not attributed: _orig_mod.positions.weight; the scores cover"):
        for step in range(2):
            for k in range(2):
                loop.backward(lambda m, s=2 * step + k: mean_shares(m, tokens(seed=s)) / 2, range(N))
            # the oracle leaves out what the run names as not covered
            loop.run._schedule._direction.P["_orig_mod.positions.weight"].zero_()
            loop.oracle_model.load_state_dict(model.state_dict())
            loop.step()
    loop.check()
    with pytest.raises(ValueError, match="the model is compiled"):
        ag.InRun(compiled, loop.optimizer, loop.val)


@SCHEDULES
def test_dropout(schedule):
    loop = Loop(gpt(dropout=0.3), schedule)
    for step in range(3):
        loop.backward(partial(mean_shares, x=tokens(seed=step)), range(N))
        loop.step()
    loop.check()


def train(schedule=None, dropout=0.3, val=val_loss, steps=5, optimizer=None, **options):
    """Trains with clipping and accumulation; returns everything that training leaves behind, and the run."""
    model = gpt(dropout)
    optimizer = with_history(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    run = ag.InRun(model, optimizer, partial(val, model), schedule, **options) if schedule else None
    torch.manual_seed(5)
    for step in range(steps):
        for k in range(2):
            if run:
                run.batch(range(N))
            (mean_shares(model, tokens(seed=2 * step + k)).sum() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        mean_shares(model, tokens(3, seed=1)).sum()  # an evaluation with a graph, between the steps
        model.train()
    state = [x for s in optimizer.state.values() for x in s.values()]
    return [*(p.detach() for p in model.parameters()), *state, torch.get_rng_state()], run


def drawing_val_loss(model):
    return mean_shares(model, torch.randint(0, VOCABULARY, (3, CONTEXT + 1))).sum()


@pytest.mark.parametrize("val", [val_loss, drawing_val_loss])
def test_training_is_unchanged_to_the_bit(val):
    plain, _ = train()
    ours, run = train("midpoint", val=val, audit_every=2, audit_permutations=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert len(run.steps) == 5 and [s.audit is not None for s in run.steps] == [False, True, False, True, False]


def test_training_is_unchanged_to_rounding_in_lookahead():
    plain, _ = train()
    ours, run = train("lookahead")
    assert torch.equal(plain[-1], ours[-1])
    for a, b in zip(plain, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert len(run.steps) == 5


def test_validation_draws_a_new_batch_each_time():
    drawn = []

    def val(model):
        drawn.append(torch.randint(0, VOCABULARY, (3, CONTEXT + 1)))
        return mean_shares(model, drawn[-1]).sum()

    model = gpt()
    with ag.InRun(model, (optimizer := torch.optim.AdamW(model.parameters())), partial(val, model)) as run:
        for step in range(4):  # the loop itself draws nothing: the training's random state never moves
            run.batch(range(N))
            mean_shares(model, tokens(seed=step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 4


def test_lookahead_without_history_is_midpoint():
    def scores(schedule, steps):
        model = gpt()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with ag.InRun(model, optimizer, partial(val_loss, model), schedule) as run:
            for step in range(steps):
                plain_step(run, model, optimizer, x=tokens(seed=step))
        return run.scores().total

    np.testing.assert_allclose(scores("lookahead", 10), scores("midpoint", 10), rtol=1e-9)
    assert np.abs(scores("lookahead", 12) - scores("midpoint", 12)).max() > 1e-6


@SCHEDULES
def test_cadence(schedule):
    calls = []

    def val(model):
        calls.append(1)
        return val_loss(model)

    _, run = train(schedule, val=val, steps=9, every=2, refresh=3)
    assert [s.step for s in run.steps] == [1, 3, 5, 7, 9]
    assert [s.refreshed for s in run.steps] == [True, False, False, True, False]
    assert len(calls) == 2
    assert run.scores().steps.tolist() == [2 * 5] * N


@SCHEDULES
def test_audit_is_the_exact_game_of_that_step(schedule):
    model = gpt()
    optimizer = with_history(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    val = partial(val_loss, model)
    cache = ag.LayerCache(model, val)
    with ag.InRun(model, optimizer, val, schedule, audit_every=2, audit_permutations=3) as run:
        for step in range(4):
            with cache:
                mean_shares(model.train(), tokens(seed=step)).sum().backward()
            game = ag.exact_shapley(cache, optimizer, permutations=3, seed=step + 1)
            optimizer.zero_grad()
            before = run.scores().total if step else 0
            plain_step(run, model, optimizer, x=tokens(seed=step))
            r, error = game.compare(torch.from_numpy(run.scores().total - before))
            audit = run.steps[-1].audit
            assert (audit is not None) == (step % 2 == 1)
            if audit:
                np.testing.assert_allclose([audit.r, audit.relative_l2], [r, error], rtol=1e-6)
                np.testing.assert_allclose(audit.loss_drop, float(game.total), rtol=1e-6)


@SCHEDULES
def test_resumed_run_ends_with_the_same_totals(schedule):
    def loop(run, model, optimizer, steps):
        for step in steps:
            run.batch(range(N))
            mean_shares(model, tokens(seed=step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build():
        model = gpt()
        optimizer = with_history(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        return model, optimizer, ag.InRun(model, optimizer, partial(drawing_val_loss, model), schedule, refresh=2)

    model, optimizer, run = build()
    loop(run, model, optimizer, range(7))
    model2, optimizer2, run2 = build()
    loop(run2, model2, optimizer2, range(3))
    saved = copy.deepcopy((model2.state_dict(), optimizer2.state_dict(), run2.state_dict()))
    run2.close()
    model3, optimizer3, run3 = build()
    for x, state in zip((model3, optimizer3, run3), saved, strict=True):
        x.load_state_dict(state)
    loop(run3, model3, optimizer3, range(3, 7))
    np.testing.assert_array_equal(run.scores().total, run3.scores().total)
    np.testing.assert_array_equal(run.scores().standardized, run3.scores().standardized)
    assert [s.step for s in run.steps] == [s.step for s in run3.steps]
    assert run.top(2) == run3.top(2)
    for value in ("total", "standardized"):
        assert run.top(1, harmful=True, value=value)[0][1] == min(getattr(run.scores(), value))


def test_targets():
    def val(model):
        return torch.stack([val_loss(model), drawing_val_loss(model) * 0 + mean_shares(model, tokens(5, seed=8)).sum()])

    _, both = train("midpoint", val=val, steps=3)
    _, first = train("midpoint", steps=3)
    assert both.scores().total.shape == (N, 2)
    np.testing.assert_allclose(both.scores().total[:, 0], first.scores().total, rtol=1e-9)


def plain_step(run, model, optimizer, ids=range(N), x=None):
    run.batch(ids)
    mean_shares(model, tokens() if x is None else x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(params=["midpoint", "lookahead"])
def running(request):
    model = gpt()
    optimizer = with_history(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    with ag.InRun(model, optimizer, partial(val_loss, model), request.param) as run:
        plain_step(run, model, optimizer)
        yield run, model, optimizer


@pytest.mark.parametrize(
    "edit",
    [
        lambda m, g: nn.utils.clip_grad_value_(m.parameters(), 1e-4),
        lambda m, g: g.add_(torch.randn_like(g) * g.std()),
        lambda m, g: g.mul_(torch.rand_like(g) > 0.5),
        lambda m, g: g.sign_(),
    ],
    ids=["clip_value", "noise", "mask", "sign"],
)
def test_elementwise_edits_are_refused(running, edit):
    run, model, optimizer = running
    run.batch(range(N))
    mean_shares(model, tokens()).sum().backward()
    edit(model, model.blocks[0].up.weight.grad)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="edited element by element"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_gradient_from_elsewhere_is_noticed(running):
    run, model, optimizer = running
    run.batch(range(N))
    (mean_shares(model, tokens()).sum() + 30 * sum(p.square().sum() for p in model.parameters())).backward()
    with pytest.warns(UserWarning, match="did not come from the recorded samples"):
        optimizer.step()


def test_errors_in_the_loop(running):
    run, model, optimizer = running
    with pytest.raises(RuntimeError, match=r"call run.batch\(ids\)"):
        optimizer.step()
    run.batch(range(N - 1))
    with pytest.raises(ValueError, match=f"{N - 1} ids.* a batch of {N}"):
        model(tokens()[:, :-1])
    with pytest.raises(ValueError, match=r"offsets must be \[7\]"):
        run.batch(range(N), torch.tensor([0, 3]))
    run.batch(range(N))
    model(tokens()[:, :-1])
    with pytest.raises(RuntimeError, match="without a backward pass"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: None)
    run.batch(range(N))
    mean_shares(model, tokens()).sum().backward()
    model.blocks[0].up.weight.grad.mul_(2)
    run.batch(range(N))
    with pytest.raises(ValueError, match="between two micro-batches"):
        mean_shares(model, tokens()).sum().backward()
    optimizer.zero_grad()
    plain_step(run, model, optimizer)
    assert run.scores().steps.tolist() == [2] * N


def test_exceptions_leave_the_model_as_it_was():
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    clean = hooks()

    def val():
        raise OSError("no validation data")

    with pytest.raises(OSError, match="no validation data"), ag.InRun(model, optimizer, val) as run:
        plain_step(run, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert hooks() == clean and not optimizer._optimizer_step_pre_hooks
    assert not any("forward" in vars(m) for m in model.modules())

    def fail(module, args):
        raise KeyError("user's own")

    optimizer.zero_grad()
    with ag.InRun(model, optimizer, partial(val_loss, model), "midpoint") as run:
        broken = model.norm.register_forward_pre_hook(fail)
        run.batch(range(N))
        with pytest.raises(KeyError, match="user's own"):
            model(tokens()[:, :-1])
        broken.remove()
        plain_step(run, model, optimizer)
        assert run.scores().steps.tolist() == [1] * N
    with pytest.raises(RuntimeError, match="closed"):
        run.batch(range(N))
