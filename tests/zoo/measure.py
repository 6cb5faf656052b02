"""One step of a run of an architecture of the zoo: its scores, and what single samples computed alone give."""

import importlib.util
import warnings
from collections.abc import Callable

import pytest
import torch
from architecture import InFloat64, losses
from families import FAMILIES, LIBRARIES
from oracles import Problem as Step
from oracles import gradients_one_by_one, inner
from torch import Tensor

import adam_ghost as ag
from adam_ghost.capture.calls import Call
from adam_ghost.run.lookahead import ContractingRecording
from adam_ghost.step.step import Step as ScoredStep


def taken_direction(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Takes down the direction ``P`` of each step that is scored: what it is, other tests tell."""
    seen: list[dict[str, Tensor]] = []

    def after(
        self: ScoredStep, P: dict[str, Tensor], *args: object, plain: Callable = ScoredStep.scores, **kwargs: object
    ) -> Tensor:
        seen.append({name: x[0].clone() for name, x in P.items()})
        return plain(self, P, *args, **kwargs)

    def ahead(
        self: ContractingRecording, P: dict, *args: object, plain: Callable = ContractingRecording.__init__, **kwargs: object
    ):
        seen.append({name: x[0].clone() for name, x in P.items()})
        plain(self, P, *args, **kwargs)

    def replay(self: Call, *args: object, plain: Callable = Call.replay, **kwargs: object) -> list:
        with InFloat64():  # also in the midst of a backward pass, where the outer one is not
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(Call, "replay", replay)
    monkeypatch.setattr(ScoredStep, "scores", after)
    monkeypatch.setattr(ContractingRecording, "__init__", ahead)
    return seen


def train(step: Step, way: str, seen: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """One step of a run, after one that gave the optimizer its history: the scores, and the oracle's."""

    def train_loss(inputs: tuple[Tensor, ...]) -> Tensor:
        return step.shares(step.model(*inputs)).sum()

    step.warm(1)
    for state in step.optimizer.state.values():
        state["step"].fill_(20)
    step.optimizer.zero_grad()
    windows = {"window": 1, "ahead": 0, "train_loss": train_loss, "feedback": "none"} if way == "window" else {}
    with ag.InRun(step.model, step.optimizer, step.val_loss, way, strict=True, fallback=False, **windows) as run:
        run.batch(range(step.n), inputs=step.inputs)
        train_loss(step.inputs).backward()
        alone = gradients_one_by_one(step)
        step.optimizer.step()
        run.flush()
        assert run.steps[-1].coverage == 1
        return torch.from_numpy(run.scores().total), torch.stack([inner(seen[-1], g) for g in alone])


def available(name: str) -> bool:
    """Whether the library that has the family is installed."""
    library = next(library for library, families in LIBRARIES.items() if name in families)
    return importlib.util.find_spec(library) is not None


def measured(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    if name in LIBRARIES["transformers"]:
        moe = __import__("transformers.integrations.moe", fromlist=["moe"])
        monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)  # torch's takes no float64
    family, seen, default = FAMILIES[name], taken_direction(monkeypatch), torch.get_default_dtype()
    try:
        with InFloat64(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="transformers|timm")
            model = family.build()
            torch.set_default_dtype(torch.float64)
            return train(Step(model, family.inputs(1), family.inputs(2), losses=losses), way, seen)
    finally:
        torch.set_default_dtype(default)
