"""Lookahead's direction P, from its definition: what the optimizer's own steps do, and which gradient its history foresees."""

import gc
import weakref

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


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
@pytest.mark.parametrize("when", ["before run.batch", "after run.batch", "after the step"])
def test_a_rate_set_after_the_step_was_foreseen_is_refused(when, lr):
    """The scores would be those of the rate before; a scheduler may set the same one again."""
    case = problem(*MODELS["layernorm"])
    case.optimizer = torch.optim.AdamW(case.model.parameters(), lr=lr)
    case.warm(11)

    def change(now):
        for group in case.optimizer.param_groups if when == now else ():
            group["lr"] = group["lr"].mul_(3) if torch.is_tensor(lr) else 3 * group["lr"]

    run = ag.InRun(case.model, case.optimizer, case.val_loss, "lookahead", strict=True)
    for step in range(2):
        change("before run.batch")
        run.batch(range(case.n))
        change("after run.batch")
        case.backward()
        if when == "after run.batch":
            with pytest.raises(ValueError, match="lr of the optimizer changed"):
                case.optimizer.step()
            break
        case.optimizer.step()
        change("after the step")
        assert run.step == step + 1
    run.close()


@pytest.mark.together
def test_a_steps_directions_are_freed_with_it():
    """As much memory as the model: it must not stay until garbage is collected."""
    case = problem(*MODELS["layernorm"])
    case.warm(11)
    run = ag.InRun(case.model, case.optimizer, case.val_loss, "lookahead", strict=True)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            run.batch(range(case.n))
            held = [weakref.ref(x) for x in run._schedule.foreseen.values()]
            assert held and all(x() is not None for x in held)
            loss = case.backward()  # which the loop keeps
            case.optimizer.step()
            assert loss is not None and not any(x() is not None for x in held)
    finally:
        gc.enable()
        run.close()
