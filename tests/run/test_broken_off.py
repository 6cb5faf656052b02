"""Loops that break off anywhere and go on: what was broken off is in no score, and the steps around it are scored as without it."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

N, KNOWN = 3, 11  # samples of a micro-batch; steps after which the model is known and lookahead looks ahead
PLACES = ["model", "part", "layer", "in the forward pass", "after the part"]


class Broken(Exception):
    pass


class Part(nn.Module):
    def __init__(self, fuse):
        super().__init__()
        self.a, self.b, self.scale, self.fuse = nn.Linear(5, 5), nn.Linear(5, 5), nn.Parameter(torch.ones(5)), fuse

    def forward(self, x):
        x = x + self.b(torch.tanh(self.a(x)))
        self.fuse.blow("in the forward pass")
        return x * self.scale


class Fuse:
    """Raises ``error`` once, where the pass comes to ``place``."""

    def __init__(self):
        self.place, self.error = None, Broken

    def blow(self, place):
        if self.place == place:
            self.place = None
            raise self.error


class Loop:
    """Every step has two micro-batches; ``broken`` lies before the first (0) or the second (1) of the step that comes next."""

    def __init__(self, schedule):
        torch.manual_seed(0)
        self.fuse, self.steps, self.seen = Fuse(), 0, 0
        self.model = nn.Sequential(nn.Linear(4, 5), Part(self.fuse), nn.LayerNorm(5), nn.Linear(5, 3)).double()
        for place, module in (
            ("model", self.model),
            ("part", self.model[1]),
            ("layer", self.model[1].b),
            ("after the part", self.model[2]),
        ):
            module.register_forward_pre_hook(functools.partial(lambda place, *_: self.fuse.blow(place), place))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        windows = {"train_loss": self.loss, "window": 3, "ahead": 2, "feedback": "double"} if schedule == "window" else {}
        self.run = ag.InRun(self.model, self.optimizer, self.validation, schedule, strict=True, **windows)

    def validation(self):
        self.fuse.blow("validation")
        return self.loss(-1)

    def loss(self, seed):
        drawn = torch.Generator().manual_seed(seed + 1000)
        x, y = torch.randn(N, 4, generator=drawn, dtype=torch.float64), torch.randint(0, 3, (N,), generator=drawn)
        return F.cross_entropy(self.model(x), y) / 2

    def step(self, broken=()):
        for k in range(2):
            for at, how, place, to_none in broken:
                if at == k:
                    self.break_off(how, place, to_none)
            seed = 2 * self.steps + k
            self.announce(f"{self.steps}.{k}", seed)
            self.loss(seed).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def announce(self, name, seed):
        self.run.batch([f"{name}.{i}" for i in range(N)], inputs=seed)

    def break_off(self, how, place, to_none):
        self.seen += 1
        seed = 5000 + self.seen
        if how == "validation raises":
            self.fuse.place, self.fuse.error = "validation", Broken
        try:
            if how != "not announced":
                self.announce(f"broken.{self.seen}", seed)
            if how in ("raises", "interrupted"):
                self.fuse.place, self.fuse.error = place, Broken if how == "raises" else KeyboardInterrupt
            if how == "evaluated":
                with torch.no_grad():
                    self.loss(seed)
            elif how != "announced":
                loss = self.loss(seed)
                if how in ("backward", "not announced", "validation raises"):
                    loss.backward()
                if how == "validation raises":
                    self.optimizer.step()
        except (Broken, KeyboardInterrupt):
            assert how in ("raises", "interrupted", "validation raises")
        else:
            assert how not in ("raises", "interrupted", "validation raises")
        if how in ("backward", "not announced", "validation raises"):
            self.optimizer.zero_grad(to_none)


@functools.cache
def unbroken(schedule, steps):
    loop = Loop(schedule)
    for _ in range(steps):
        loop.step()
    loop.run.close()
    return dict(zip(loop.run.scores().ids, loop.run.scores().total, strict=True))


WITHIN = ["announced", "forward", "evaluated", "raises", "interrupted"]  # without a gradient, also between two micro-batches
BREAKS = st.one_of(
    st.tuples(st.integers(0, 1), st.sampled_from(WITHIN), st.sampled_from(PLACES), st.booleans()),
    st.tuples(
        st.just(0), st.sampled_from(["backward", "not announced", "validation raises"]), st.sampled_from(PLACES), st.booleans()
    ),
)


@pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
@pytest.mark.parametrize("schedule", ["midpoint", "lookahead", "window"])
@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
@given(known=st.booleans(), sequence=st.lists(st.lists(BREAKS, max_size=2), min_size=1, max_size=4))
def test_loops_that_break_off_anywhere(schedule, known, sequence):
    loop = Loop(schedule)
    for _ in range(KNOWN if known else 0):
        loop.step()
    for broken in sequence:
        # of a window it fails all steps
        loop.step([b for b in broken if schedule != "window" or b[1] != "validation raises"])
    loop.run.close()
    found, want = loop.run.scores(), unbroken(schedule, loop.steps)
    assert list(found.ids) == list(want)
    np.testing.assert_allclose(found.total, list(want.values()), rtol=1e-9, atol=1e-12)
