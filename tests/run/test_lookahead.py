"""Lookahead's direction P, from its definition: what the optimizer's own steps do, and which gradient its history foresees."""

import gc
import weakref

import pytest
import torch
from models import SEQUENCES, D, Fn, around, normal, problem
from oracles import close, gradients, gradients_one_by_one, inner

import adam_ghost as ag
from adam_ghost.scores import ops

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


class Tied(torch.nn.Module):
    """A language model whose head is its embedding; or with a layer, too, whose weight is used otherwise as well."""

    def __init__(self, again):
        super().__init__()
        self.again = again
        self.embedding, self.a, self.b = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.norm, self.head = torch.nn.LayerNorm(16), torch.nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.b(torch.tanh(self.a(x)))
        x = x @ self.b.weight if self.again else x
        return self.head(self.norm(x))


@pytest.mark.filterwarnings("ignore:adam_ghost. step 1 has no scores")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_directions_are_as_narrow_as_their_readers(monkeypatch, compiled):
    """Under autocast a kernel reads ``P`` of a linear layer's weight in bfloat16; another reader, or none at all, in float32."""

    def scores(kernel, autocast=True):
        # which CPUs have not: the definitions serve, and take any dtype
        monkeypatch.setattr(ops, "has_kernel", lambda op, *tensors: kernel)
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Tied(again=not compiled)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tokens = torch.randint(20, (12, 9))
        called = torch.compile(model, backend="aot_eager") if compiled else model

        def loss(rows):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and (compiled or run.step < 14)):
                logits = called(rows[:, :-1])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

        run = ag.InRun(called, optimizer, lambda: loss(tokens[8:]), "lookahead", fallback=False)
        dtypes = []
        for step in range(16):
            run.batch([f"{step}-{i}" for i in range(8)])
            foreseen = run._schedule.foreseen or {}
            dtypes.append({k.removeprefix("_orig_mod.") for k, x in foreseen.items() if x.dtype == torch.bfloat16})
            assert all(x.dtype in (torch.bfloat16, torch.float32) for x in foreseen.values())
            direction = run._schedule._direction
            assert direction is None or direction.total.dtype == direction.history.dtype == torch.float32
            loss(tokens[:8]).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.close()
        return dtypes, torch.from_numpy(run.scores().total)

    narrow = {"embedding.weight", "a.weight"} | ({"b.weight"} if compiled else set())
    dtypes, found = scores(kernel=True)
    assert dtypes[13] == narrow
    assert dtypes[15] == (narrow if compiled else set())  # after a step without autocast
    wide, expected = scores(kernel=False)
    assert not any(wide)
    assert found.isfinite().all() and found.dtype == torch.float64 and len(found) == len(expected)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 4e-3 * expected.norm()  # of bfloat16's 2^-9 per element
    plain, _ = scores(kernel=True, autocast=False)
    assert not any(plain)
