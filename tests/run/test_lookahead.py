"""Lookahead's direction P, from its definition: what the optimizer's own steps do, and which gradient its history foresees."""

import pytest
import torch
from models import SEQUENCES, D, Fn, around, normal, problem
from oracles import close, gradients, gradients_one_by_one, inner

import adam_ghost as ag

MODELS = {
    "nanogpt": SEQUENCES["nanogpt"],
    "layernorm": SEQUENCES["layernorm"],
    "changed-in-place": (
        lambda: around(torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.ReLU(inplace=True), torch.nn.Linear(D, 3))),
        "x",
    ),
    "rows-never-seen": (lambda: around(Fn(lambda s, x: s.b(x) * s.w[0], b=torch.nn.Linear(D, 3), w=normal(4, 3))), "x"),
}


def expected_gradients(optimizer, params):
    """The first moment's sign and the second moment's size, at least a tenth of the parameter's root mean square."""
    found = {}
    for name, p in params.items():
        state = optimizer.state[p]
        beta2 = optimizer.param_groups[0]["betas"][1]
        v = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
        size = torch.maximum(v.sqrt(), 0.1 * v.mean().sqrt())
        found[name] = torch.where(state["exp_avg"].signbit(), -size, size)
    return found


def direction(case):
    """``P``: the validation gradient where history alone leads, times the quotient of real steps without and with ``g``."""
    params = {name: p for name, p in case.model.named_parameters() if p in case.optimizer.state}
    expected = expected_gradients(case.optimizer, params)
    for name, p in params.items():
        p.grad = expected[name]
    alone, stepped = case.after_step(0.0), case.after_step(1.0)
    held = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        p.data.copy_(alone[name])
    val = gradients(case.val_loss(), params)
    for name, p in params.items():
        p.data.copy_(held[name])
    return {name: val[name] * (alone[name] - stepped[name]) / expected[name] for name in params}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("name", [*MODELS, pytest.param("nanogpt", marks=pytest.mark.together, id="nanogpt together")])
def test_direction(name, kind):
    def warm():
        case = problem(*MODELS[name])
        case.optimizer = kind(case.model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        return case.warm(11)

    alone = warm()
    P = direction(alone)
    alone.backward()
    want = torch.stack([inner(P, g) for g in gradients_one_by_one(alone)])

    case = warm()
    with ag.InRun(case.model, case.optimizer, case.val_loss, "lookahead", strict=True) as run:
        run.batch(range(case.n))
        case.backward()
        case.optimizer.step()
        close(torch.from_numpy(run.scores().total), want)
