"""What windows' feedback is worth by differences of gradients, against double backward: its products, and the credit they give.

A language model whose gradients turn round within a small part of its weights' norm, the smaller the larger it is.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.capture.calls import rng_state
from adam_ghost.demo.model import GPT
from adam_ghost.processes.world import World
from adam_ghost.run.feedback import differences, double
from adam_ghost.run.rerun import KeptBatch, Rerun
from adam_ghost.run.small_step import SmallSteps, moved, norm

VOCABULARY, CONTEXT, LAYERS, BATCH, LR = 1000, 64, 4, 8, 1e-3
WINDOW = AHEAD = 16
# of the weights' norm: a step of fixed length, as it has to be in a small MLP for the least error, in either precision
FIXED = {"float32": 1e-3, "bfloat16": 3e-2}
WAYS = ("differences", "gauss-newton", "none")


class Setting(NamedTuple):
    width: int
    precision: str  # of autocast
    start: int  # steps of plain training before


SETTINGS = [Setting(width, precision, start) for precision in FIXED for width, start in ((64, 60), (256, 60), (128, 0))]


class Training:
    """Tokens by Zipf's law, every other of which follows from the one before."""

    def __init__(self, setting: Setting):
        torch.manual_seed(0)
        self.setting = setting
        self.model = GPT(VOCABULARY, CONTEXT, LAYERS, setting.width, heads=4)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        self.generator = torch.Generator().manual_seed(1)
        self.held_out = self.batch()
        for _ in self.steps(setting.start):
            pass

    def batch(self) -> Tensor:
        """``[BATCH, CONTEXT + 1]``."""
        likely = 1 / torch.arange(1.0, VOCABULARY + 1)
        x = torch.multinomial(likely, BATCH * (CONTEXT + 1), True, generator=self.generator).view(BATCH, CONTEXT + 1)
        x[:, 1::2] = (7 * x[:, :-1:2] + 3) % VOCABULARY
        return x

    def loss(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def autocast(self) -> AbstractContextManager:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.setting.precision == "bfloat16")

    def steps(self, n: int) -> Iterator[Tensor]:
        """The batch of each step, which is taken when the loop goes on."""
        for _ in range(n):
            x = self.batch()
            yield x
            with self.autocast():
                loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def products(setting: Setting) -> dict[str, float]:
    """Relative errors of ``H v``, ``v`` the validation gradient over Adam's root, if any: by differences, by a fixed length."""
    t = Training(setting)
    rerun = Rerun(t.model, dict(t.model.named_parameters()), t.loss, World())
    x = t.batch()
    with t.autocast():
        batch: KeptBatch = rerun.keep(range(BATCH), x, None, rng_state(rerun.device))
    batch.scale = torch.ones(())
    grads = rerun.gradient([batch])
    root = [t.optimizer.state[p]["exp_avg_sq"].sqrt() + 1e-8 if setting.start else 1.0 for p in rerun.params]
    vector = [g / r for g, r in zip(torch.autograd.grad(t.loss(t.held_out), rerun.params), root, strict=True)]
    exact = double(rerun, [batch], grads, vector, SmallSteps(rerun))
    c = FIXED[setting.precision] * norm([p.detach() for p in rerun.params]) / norm(vector)
    with moved(rerun, vector, c):
        fixed = [(there - g) / c for there, g in zip(rerun.gradient([batch]), grads, strict=True)]
    found = {"differences": differences(rerun, [batch], grads, vector, SmallSteps(rerun)), "fixed": fixed}
    return {way: float(norm([a - b for a, b in zip(x, exact, strict=True)]) / norm(exact)) for way, x in found.items()}


def credit(setting: Setting, feedback: str) -> Tensor:
    """``[WINDOW * BATCH]``: of a window's samples."""
    t = Training(setting)
    options = {"window": WINDOW, "ahead": AHEAD, "feedback": feedback, "train_loss": t.loss}
    with ag.InRun(t.model, t.optimizer, lambda: t.loss(t.held_out), "window", every=2, **options) as run:
        for number, x in enumerate(t.steps(WINDOW + AHEAD)):
            run.batch(range(number * BATCH, (number + 1) * BATCH), inputs=x)
    return torch.from_numpy(run.scores().total)


def measure(report: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Per setting the products' errors, and R and relative L2 of every way's credit to that by double backward."""
    rows = []
    for setting in SETTINGS:
        row: dict[str, Any] = setting._asdict() | {"products": products(setting)}
        exact = credit(setting, "double")
        for way in WAYS:
            found = credit(setting, way)
            r = float(torch.corrcoef(torch.stack([found, exact]))[0, 1])
            row[way] = {"r": r, "relative_l2": float((found - exact).norm() / exact.norm())}
        report(row)
        rows.append(row)
    return rows
