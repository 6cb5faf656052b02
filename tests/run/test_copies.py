"""Copies of a model that a run is attached to carry nothing of the run, and compute what the bare model does."""

import copy
import pickle
from contextlib import nullcontext
from io import BytesIO

import pytest
import torch
from snapshots import residue
from torch import nn
from torch.optim.swa_utils import AveragedModel

import adam_ghost as ag
from adam_ghost.demo.model import GPT

N, VOCABULARY, CONTEXT = 4, 19, 8
SCHEDULES = ["midpoint", "gauss", "lookahead", "compiled", "window"]


def saved_and_loaded(model):
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "averaged": lambda model: AveragedModel(model).module,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def tokens(seed):
    return torch.randint(0, VOCABULARY, (N, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def loss(model, seed):
    x = tokens(seed)
    return nn.functional.cross_entropy(model(x[:, :-1]).mT, x[:, 1:])


class Training:
    """A few steps of a small GPT with a run attached."""

    def __init__(self, schedule, ledger=None):
        torch.manual_seed(0)
        self.bare = GPT(VOCABULARY, CONTEXT, 2, 16, 2).double()
        self.model = self.bare
        if schedule == "compiled":
            torch._dynamo.reset()  # which keeps what it compiled of GPT.forward, up to eight times
            self.model, schedule = torch.compile(self.bare, backend="eager"), "lookahead"
        self.optimizer = torch.optim.AdamW(self.bare.parameters(), lr=1e-3)
        for seed in range(11):  # a past for lookahead to look at
            self.step(seed)
        self.residue = residue(self.bare)
        options = {"window": 2, "ahead": 1, "train_loss": lambda seed: loss(self.model, seed)} if schedule == "window" else {}
        self.run = ag.InRun(self.model, self.optimizer, lambda: loss(self.model, 99), schedule, ledger=ledger, **options)

    def step(self, seed, announced=False):
        if announced:
            self.run.batch(range(N), inputs=seed)
        loss(self.model, seed).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def belongings(model):
    """The modules that the hooks and patched methods on ``model`` come from."""
    held = [v for m in model.modules() for hooks in vars(m).values() if isinstance(hooks, dict) for v in hooks.values()]
    held += [m.forward for m in model.modules()]
    owners = [getattr(x, "__self__", x) for x in held]
    return {type(x).__module__ for x in owners} | {getattr(x, "__module__", None) for x in held if not isinstance(x, nn.Module)}


@pytest.mark.filterwarnings(
    "ignore:adam_ghost. (not attributed. _orig_mod.positions.weight|the run ended)"
)  # a lookup without a batch
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("ledger", [False, True], ids=["", "ledger"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_are_inert(schedule, ledger, way, tmp_path):
    training = Training(schedule, tmp_path / "run" if ledger else None)
    training.step(1, announced=True)
    training.run.batch(range(N), inputs=2)  # a copy that still belonged to the run would be recorded
    copied = COPIES[way](training.bare)
    assert not {m for m in belongings(copied) if m and m.startswith("adam_ghost") and m != GPT.__module__}
    found = loss(copied, 2)
    found.backward()
    assert torch.equal(found, loss(training.model, 2))
    training.run.close()
    assert torch.equal(loss(copied, 2), found)
    assert b"adam_ghost.capture" not in pickle.dumps(copied)


def test_a_copy_can_be_attributed_itself():
    """What a copy's layers have for a forward is their class's: the kinds of its layers are known."""
    training = Training("lookahead")
    bare = copy.deepcopy(training.bare)
    training.run.close()
    scores = []
    for model in (bare, copy.deepcopy(training.bare)):
        cache = ag.LayerCache(model, lambda model=model: loss(model, 99), strict=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with cache:
            loss(model, 3).backward()
        scores.append(ag.attribute(cache, optimizer))
    assert torch.equal(*scores)


def test_a_copy_compiles_whole():
    training = Training("lookahead")
    copied = copy.deepcopy(training.bare)
    found = torch.compile(copied, backend="eager", fullgraph=True)(tokens(1)[:, :-1])
    assert torch.equal(found, training.bare(tokens(1)[:, :-1]))


@pytest.mark.filterwarnings("ignore:adam_ghost. (not attributed. _orig_mod.positions.weight|the run ended)")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_stays(schedule):
    training = Training(schedule)
    training.step(1, announced=True)
    training.run.close()
    assert residue(training.bare) == training.residue


@pytest.mark.parametrize("schedule", ["lookahead", "compiled"])
def test_a_forward_that_someone_set_since_stays(schedule):
    training = Training(schedule)
    layer = next(m for m in training.bare.modules() if type(m) is nn.Linear)
    theirs = layer.forward = lambda x: nn.Linear.forward(layer, x)
    training.run.close()
    assert vars(layer)["forward"] is theirs


class Interrupted(nn.Module):
    """A layer in which the user presses Ctrl-C once."""

    def __init__(self):
        super().__init__()
        self.scale, self.pressed = nn.Parameter(torch.ones(16).double()), False

    def forward(self, x):
        if self.pressed:
            self.pressed = False
            raise KeyboardInterrupt
        return x * self.scale


@pytest.mark.parametrize("taken", [0, 13], ids=["in the first step", "when the model is known"])
@pytest.mark.parametrize("after", ["batch", "step", "close"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "under another mode"])
@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_interrupted_in_the_forward_pass(schedule, others, after, taken):
    torch.manual_seed(0)
    layer = Interrupted()
    model = nn.Sequential(nn.Linear(3, 16), layer, nn.Linear(16, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(N, 3).double()
    run = ag.InRun(model, optimizer, lambda: model(x).square().sum(), schedule, strict=True)
    before = torch.overrides._get_current_function_mode_stack()

    def take():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(taken):
        run.batch(range(N))
        take()
    run.batch(range(N))
    layer.pressed = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    other = torch.overrides.BaseTorchFunctionMode()
    with other if others else nullcontext():
        if after == "step":
            with pytest.raises(RuntimeError, match="without a recorded forward pass"):
                optimizer.step()
        elif after == "close":
            run.close()
        else:
            run.batch(range(N))
        assert torch.overrides._get_current_function_mode_stack() == [*before, other][: len(before) + others]
    if after == "batch":
        take()
        assert len(run.steps) == taken + 1 and run.scores().steps.tolist() == [taken + 1] * N
