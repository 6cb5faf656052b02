"""Windows in loops that do what a window cannot follow, or nearly cannot: refused or named, never silently wrong."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import adam_ghost

SAMPLES, WINDOW, AHEAD = 6, 4, 3
STEPS = WINDOW + AHEAD
cross_entropy = nn.functional.cross_entropy


def small_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(5)
    random = {"generator": drawn, "dtype": torch.float64}
    return [(torch.randn(SAMPLES, 5, **random), torch.randint(0, 3, (SAMPLES,), generator=drawn)) for _ in range(steps)]


def mean_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def run_window(
    model,
    *,
    optimizer=None,
    train_loss=mean_loss,
    before_step=None,
    after_step=None,
    before_close=None,
    steps=STEPS,
    dtype=None,
    **options,
):
    """Scores ``[WINDOW, SAMPLES]`` of one window in a plain loop."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-2)
    dtype = dtype or next(model.parameters()).dtype
    *data, (x_val, y_val) = batches(steps + 1)
    options = {"window": WINDOW, "ahead": AHEAD, "bounded": False, "feedback": "double", "strict": True} | options
    loss = lambda batch: train_loss(model, batch)  # noqa: E731
    val_loss = lambda: cross_entropy(model(x_val.to(dtype)), y_val)  # noqa: E731
    run = adam_ghost.InRun(model, optimizer, val_loss, "window", train_loss=loss, **options)
    for step, (x, y) in enumerate(data):
        batch = (x.to(dtype), y)
        run.batch([f"{step}.{i}" for i in range(SAMPLES)], inputs=batch)
        loss(batch).backward()
        if before_step is not None:
            before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        if after_step is not None:
            after_step(step, model, optimizer, batch)
    if before_close is not None:
        before_close(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adam_ghost: the run ended")
        run.close()
    return torch.from_numpy(run.scores().total).view(-1, SAMPLES)[:WINDOW]


def test_a_loss_that_is_linear_in_the_output_bends_nowhere():
    linear = lambda model, batch: model(batch[0])[:, 0].mean()  # noqa: E731
    found, expected = (run_window(small_network(), train_loss=linear, feedback=way) for way in ("gauss-newton", "none"))
    assert torch.equal(found, expected)


@torch.no_grad()
def _shrink(step, model, optimizer, batch):
    if step == 2:
        model[0].weight.mul_(0.98)


def _shrink_behind_autograd(step, model, optimizer, batch):
    if step == 4:
        model[2].weight.data.mul_(0.98)


def _average(step, model, optimizer, batch):
    if step == 3:
        model.load_state_dict({name: 0.99 * x for name, x in model.state_dict().items()})


def _reset_moments(step, model, optimizer, batch):
    if step == 2:
        for state in optimizer.state.values():
            state["exp_avg"].zero_()


@pytest.mark.parametrize("change", [_shrink, _shrink_behind_autograd, _average, _reset_moments])
def test_weights_and_moments_changed_by_hand_are_refused(change):
    with pytest.raises(ValueError, match=r"is not where steps \d to \d lead: weights or optimizer state were changed"):
        run_window(small_network(), after_step=change)


@pytest.mark.parametrize("optimizer", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_the_optimizer_alone_are_followed(optimizer, dtype):
    model = small_network().to(dtype)
    scores = run_window(model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-2, **optimizer))
    assert scores.isfinite().all() and scores.abs().sum() > 0


class PartlyUnused(nn.Module):
    """Some of its parameters get gradients of zeros."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.unused, self.outer = nn.Linear(5, 7), nn.Linear(5, 1), nn.Linear(7, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)) + 0 * self.unused(x))


class Used(PartlyUnused):
    """The same without them."""

    def __init__(self):
        super().__init__()
        del self.unused

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.parametrize("schedule", ["window", "lookahead"])
def test_gradients_of_zeros_beside_clipped_ones(schedule):
    """Clipping leaves zeros where they are, which says nothing of the factor."""
    model = PartlyUnused().double()
    if schedule == "window":

        def clip(model):
            nn.utils.clip_grad_norm_(model.parameters(), 0.2)

        torch.testing.assert_close(
            run_window(PartlyUnused().double(), before_step=clip), run_window(Used().double(), before_step=clip)
        )
        return
    *data, (x_val, y_val) = batches(14)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    run = adam_ghost.InRun(model, optimizer, lambda: cross_entropy(model(x_val), y_val), schedule, strict=True)
    for step, (x, y) in enumerate(data):
        run.batch([f"{step}.{i}" for i in range(SAMPLES)])
        cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    run.close()
    assert len(run.steps) == len(data)


def test_clipping_to_another_norm_is_named():
    def clip(model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.02, norm_type=float("inf"))

    with pytest.raises(RuntimeError, match="scaled down by factors that change from step to step, and not to one norm"):
        run_window(small_network(), before_step=clip)
    with pytest.warns(UserWarning, match="adam_ghost: steps 1 to 7: gradients were scaled down"):
        run_window(small_network(), before_step=clip, strict=False)


def _scores_under_autocast(schedule: str, *, step_inside: bool) -> torch.Tensor:
    model = small_network().float()
    *data, (x_val, y_val) = batches(15)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train_loss(batch):
        return cross_entropy(model(batch[0]).float(), batch[1])

    def val_loss():
        with torch.autocast("cpu", torch.bfloat16):
            return train_loss((x_val.float(), y_val))

    options = {"train_loss": train_loss, "window": 8, "ahead": 6} if schedule == "window" else {}
    run = adam_ghost.InRun(model, optimizer, val_loss, schedule, strict=True, **options)
    for step, (x, y) in enumerate(data):
        with torch.autocast("cpu", torch.bfloat16, enabled=step_inside):
            run.batch([f"{step}.{i}" for i in range(SAMPLES)], inputs=(x.float(), y))
            with torch.autocast("cpu", torch.bfloat16):
                loss = train_loss((x.float(), y))
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adam_ghost: the run ended")
        run.close()
    return torch.from_numpy(run.scores().total)


TOGETHER = pytest.param("lookahead", marks=pytest.mark.together, id="lookahead together")


@pytest.mark.parametrize("schedule", ["midpoint", "gauss", "lookahead", TOGETHER, "window"])
def test_a_step_inside_of_autocast_is_scored_like_one_outside(schedule):
    """Autocast keeps casts of the weights as they were: other weights would not count."""
    inside, outside = (_scores_under_autocast(schedule, step_inside=inside) for inside in (True, False))
    # a backward pass under autocast multiplies in bfloat16 where lookahead forms gradients and scores in one product
    rounding = outside.abs().max() * 2**-8 if schedule == "lookahead" else 0
    torch.testing.assert_close(inside, outside, rtol=0, atol=float(rounding))


@pytest.mark.filterwarnings("ignore:adam_ghost. the credit of steps")
def test_differences_of_weights_near_zero():
    """A step in proportion to weights of 1e-5 would be rounded away in float32."""

    def scores(feedback):
        model = nn.Linear(5, 3)
        for p in model.parameters():
            nn.init.zeros_(p)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        # without those of steps whose second moments are near zero
        return run_window(model, optimizer=optimizer, feedback=feedback, ahead=12, steps=16)[2:]

    exact = scores("double")
    assert (scores("differences") - exact).norm() < 0.05 * (scores("none") - exact).norm()


@pytest.mark.filterwarnings("ignore:adam_ghost. weights of half precision")
def test_differences_of_bfloat16_weights():
    def scores(feedback):
        model = small_network().bfloat16()
        return run_window(model, feedback=feedback, ahead=12, steps=16, strict=False)

    exact = scores("double")
    assert (scores("none") - exact).norm() > 0.2 * exact.norm()
    assert (scores("differences") - exact).norm() < 0.1 * exact.norm()


def test_random_numbers_drawn_around_the_forward_pass():
    """Noise on the inputs, a mask in the model, noise on the outputs: all as in the loop, told by the gradient run again."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()

    def noisy(model, batch):
        x, y = batch
        out = model(x + torch.randn_like(x))
        return cross_entropy(out + torch.randn_like(out), y)

    assert run_window(model, train_loss=noisy).isfinite().all()


@pytest.mark.parametrize("feedback", ["differences", "double"])
def test_a_train_loss_of_another_model_is_named(feedback):
    own, other, calls = small_network(), small_network(), []

    def of_another(model, batch):  # from the first sweep on
        calls.append(batch)
        return mean_loss(own if len(calls) <= STEPS else other, batch)

    with pytest.raises(ValueError, match=r"steps 1 to 4 have no scores: .* needs a model that train_loss calls once"):
        run_window(own, train_loss=of_another, feedback=feedback, bounded=feedback == "differences")


def test_inputs_changed_in_place_are_told_of():
    def reuse(step, model, optimizer, batch):
        batch[0].zero_()

    with pytest.raises(ValueError, match=r"another gradient.*its inputs were changed in place since: give run\.batch copies"):
        run_window(small_network(), after_step=reuse)


class RunningMean(nn.Module):
    """Centres its inputs by a mean that it updates as it goes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return self.outer(torch.tanh(self.inner(x - self.mean)))


class Limited(nn.Module):
    """Its largest singular value is held by a power iteration, one step in each forward pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.utils.spectral_norm(nn.Linear(5, 7)), nn.Linear(7, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class ReplacedMean(RunningMean):
    """By a new tensor each time."""

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return self.outer(torch.tanh(self.inner(x - self.mean)))


@pytest.mark.parametrize("feedback", ["double", "differences", "forward"])
@pytest.mark.parametrize("kind", [RunningMean, ReplacedMean])
def test_buffers_that_change_are_those_of_their_step(kind, feedback):
    model = kind().double()
    before = {}

    def look(model):
        before.update({name: x.clone() for name, x in model.named_buffers()})

    assert run_window(model, feedback=feedback, before_close=look).isfinite().all()
    for name, x in model.named_buffers():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize(
    ("schedule", "compiled"), [("midpoint", False), ("gauss", False), ("lookahead", False), ("lookahead", True)]
)
@pytest.mark.filterwarnings("ignore:adam_ghost. step 1 has no scores")
def test_buffers_that_a_forward_pass_replaces_are_those_of_bare_training(schedule, compiled):
    def train(attributed: bool) -> torch.Tensor:
        bare = ReplacedMean().double()
        model = torch.compile(bare, backend="eager") if compiled else bare
        *data, (x_val, y_val) = batches(4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        if attributed:
            run = adam_ghost.InRun(model, optimizer, lambda: cross_entropy(model(x_val), y_val), schedule)
        for step, (x, y) in enumerate(data):
            if attributed:
                run.batch([f"{step}.{i}" for i in range(SAMPLES)])
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if attributed:
            run.close()
        return bare.mean

    assert torch.equal(train(attributed=True), train(attributed=False))


def test_inside_of_autocast_is_as_outside():
    model = small_network().float()
    (x, y), (x_val, y_val) = batches(2)

    def loss(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(x.float()).float(), y)

    cache = adam_ghost.LayerCache(model, lambda: loss(x_val, y_val))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def found():
        grams = [adam_ghost.gram(cache, optimizer, preconditioner=D) for D in ("exact", "factored", None)]
        return adam_ghost.attribute(cache, optimizer), *grams, adam_ghost.exact_shapley(cache, optimizer, permutations=2).values

    with torch.autocast("cpu", torch.bfloat16):
        with cache:
            loss(x, y).backward()
        inside = found()
    for got, want in zip(inside, found(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def train_from_a_cancelling_gradient(**options):
    """In the first batch every sample is there twice, with its last input's sign turned, whose weights are 0: theirs cancel."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight[:, 5] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    held_out = torch.randn(50, 6), torch.randint(0, 3, (50,))
    with adam_ghost.InRun(model, optimizer, lambda: loss(held_out), "window", window=8, ahead=0, train_loss=loss, **options) as run:
        for step in range(8):
            x, y = torch.randn(24, 6), torch.randint(0, 3, (24,))
            if step == 0:
                x[12:], y[12:] = x[:12] * torch.tensor([1, 1, 1, 1, 1, -1]), y[:12]
            run.batch(range(24 * step, 24 * step + 24), inputs=(x, y))
            loss((x, y)).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_first_steps_are_bounded():
    """At a sample's distance, the derivative of a step that is nearly the sign of its gradient drowns nothing (and warns not)."""
    train_from_a_cancelling_gradient()


def test_credit_that_drowns_the_others_is_told():
    """The plain derivative is up to lr / eps."""
    with pytest.warns(UserWarning, match=r"the credit of steps \[1\] is more than 20 times"):
        train_from_a_cancelling_gradient(bounded=False)


def test_audits_of_packed_samples_are_refused_when_they_are_announced():
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    (x, y), (x_val, y_val) = batches(2)
    val_loss = lambda: cross_entropy(model(x_val), y_val)  # noqa: E731
    options = {"train_loss": lambda batch: mean_loss(model, batch), "audit_every": 1}
    run = adam_ghost.InRun(model, optimizer, val_loss, "window", **options)
    with pytest.raises(ValueError, match=r"audit_every, .*, knows no samples that are packed in rows"):
        run.batch([0, 1], torch.tensor([0, 3, SAMPLES]), inputs=(x, y))
    run.close()


def test_a_parameter_that_left_the_model_is_named():
    def leave(step, model, optimizer, batch):
        if step == WINDOW:
            model[2].bias = None

    with pytest.raises((ValueError, RuntimeError), match=r"'2\.bias' is not the model's any more"):
        run_window(small_network(), after_step=leave)


def test_windows_that_fail_at_the_end_leave_the_others_scored():
    def scores(failing):
        model = small_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        *data, val = batches(10)
        sweeps = 0

        def val_loss():
            nonlocal sweeps
            sweeps += 1
            if sweeps <= failing:
                raise RuntimeError("out of memory")
            return mean_loss(model, val)

        options = {"window": 3, "ahead": 20, "feedback": "double", "train_loss": lambda batch: mean_loss(model, batch)}
        run = adam_ghost.InRun(model, optimizer, val_loss, "window", **options)
        for step, batch in enumerate(data):
            run.batch([f"{step}.{i}" for i in range(SAMPLES)], inputs=batch)
            mean_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        lost = {0: "", 2: "steps 1 to 3 have no scores: out of memory.* Nor have steps 4 to 6$"}[failing]
        with pytest.raises(RuntimeError, match=lost) if lost else nullcontext():
            run.close()
        return dict(zip(run.scores().ids, run.scores().total, strict=True))

    with pytest.warns(UserWarning, match="the run ended"):
        left, all_of_them = scores(2), scores(0)
    assert left == {i: x for i, x in all_of_them.items() if int(i[0]) >= 6} and len(left) == 3 * SAMPLES
