"""An optimizer and a kind of layer are added from outside by a file and a line each; scores are exact all the same."""

import importlib
import sys

import pytest
import torch
from oracles import Problem, close, gradients_one_by_one, inner
from torch import nn

import adam_ghost as ag
from adam_ghost.capture import kinds
from adam_ghost.optim import protocol
from adam_ghost.scores import forms

N, T, D = 5, 3, 6


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The toys, for one test."""
    for module, registry in ((protocol, "_READERS"), (forms, "_FORMS"), (kinds, "_KINDS")):
        monkeypatch.setattr(module, registry, type(held := getattr(module, registry))(held))
    for toy in ("toys.heavy_ball", "toys.scale"):
        monkeypatch.delitem(sys.modules, toy, raising=False)
        importlib.import_module(toy)


def case():
    torch.manual_seed(0)
    from toys.heavy_ball import HeavyBall
    from toys.scale import Scale

    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), Scale(D), nn.Linear(D, 2)).double()
    optimizer = HeavyBall(model.parameters(), lr=1e-2, momentum=0.8, weight_decay=0.1)
    x, val = torch.randn(2, N, T, D).double()
    return Problem(model, (x,), (val,), optimizer=optimizer).warm()


def expected():
    plain = case()
    plain.backward()
    P = plain.direction()
    return torch.stack([inner(P, g) for g in gradients_one_by_one(plain)])


def test_thin_layer():
    close(case().record().attribute(), expected())


def test_the_form_of_the_layer_is_asked(monkeypatch):
    found = case().record()
    of_all, form = found.attribute(), forms._FORMS["scale"]
    monkeypatch.setitem(forms._FORMS, "scale", form._replace(scores=lambda *call: 0 * form.scores(*call)))
    assert (of_all - found.attribute()).abs().min() > 0


def test_gram():
    found = case().record()
    lr = found.optimizer.param_groups[0]["lr"]
    one_by_one = torch.stack([torch.cat([x.flatten() for x in g.values()]) for g in gradients_one_by_one(found)])
    close(ag.gram(found.cache, found.optimizer), lr * one_by_one @ one_by_one.T)


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_running_layer(schedule):
    """In lookahead the first steps, whose history is too short, go the midpoint's way."""
    loop = case()
    with ag.InRun(loop.model, loop.optimizer, loop.val_loss, schedule, strict=True) as run:
        run.batch(range(N))
        loop.backward()
        loop.optimizer.step()
        close(torch.from_numpy(run.scores().total), expected())


def test_adjoint():
    """Through two steps, against autograd through the same two steps written out."""
    from toys.heavy_ball import HeavyBallState

    loop = case()
    loop.backward()
    params = list(loop.model.parameters())
    grads, val = [p.grad.clone() for p in params], [torch.randn_like(p) for p in params]
    start = HeavyBallState.of(loop.optimizer).kept(params)
    scalars = start.scalars(list(start.parameters()))
    states = [start, start.advanced(grads, scalars)]
    adjoint = states[1].advanced(grads, scalars).adjoint([v.unsqueeze(0).clone() for v in val])
    pulled = [state.pull(grads, adjoint) for state in reversed(states)][::-1]

    leaves = [[g.clone().requires_grad_() for g in grads] for _ in states]
    weights = [p.detach() for p in params]
    buffers = [loop.optimizer.state[p]["momentum_buffer"] for p in params]
    for gs in leaves:
        buffers = [0.8 * b + g + 0.1 * w for b, g, w in zip(buffers, gs, weights, strict=True)]
        weights = [w - 1e-2 * b for w, b in zip(weights, buffers, strict=True)]
    sum((w * v).sum() for w, v in zip(weights, val, strict=True)).backward()
    for found, want in zip(pulled, leaves, strict=True):
        for x, g in zip(found, want, strict=True):
            close(x[0], g.grad)


def test_toys_leave_with_the_test(monkeypatch):
    monkeypatch.undo()
    model = nn.Linear(2, 2)
    from toys.heavy_ball import HeavyBall

    with pytest.raises(TypeError, match="got HeavyBall"):
        protocol.read_one(HeavyBall(model.parameters(), 0.1, 0.9, 0.0))
