"""The weights of a validation pass lie elsewhere, and nobody who knows the parameters' memory notices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.step.validation import Validation


def kept_of(model):
    return Validation(None, model), list(model.parameters())


def moved(places):
    for x in places:
        x.fill_(7.0)


@pytest.mark.parametrize("write", [moved, None])
def test_weights_are_elsewhere_and_come_back(write):
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last))
    validation, params = kept_of(model)
    before, places, strides = [p.detach().clone() for p in params], [p.data_ptr() for p in params], [p.stride() for p in params]
    for _ in range(2):
        with validation.weights_kept(params, write) as (inside, held):
            if write is None:
                assert all(map(torch.equal, params, before))
                for p in params:
                    p.data.fill_(7.0)
            assert all((p == 7.0).all() and (x == 7.0).all() for p, x in zip(params, inside, strict=True))
            assert all(map(torch.equal, held, before))
            assert all(p.data_ptr() != place for p, place in zip(params, places, strict=True))
            assert [p.stride() for p in params] == strides
        del inside, held  # by which the weights' memory would be known
        assert all(map(torch.equal, params, before)) and [p.data_ptr() for p in params] == places


def test_who_looks_at_the_memory_sees_the_weights_move():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.LSTM(2, 2)])
    model[1].weight.data = model[0].weight.data.T  # tied by memory
    view = model[0].bias.detach()[1:]
    validation, params = kept_of(model)
    before = [p.detach().clone() for p in params]
    with validation.weights_kept(params, moved):
        assert (view == 7.0).all() and (model[1].weight == 7.0).all()
        assert model[1].weight.data_ptr() == model[0].weight.data_ptr()
    assert all(map(torch.equal, params, before))
    assert torch.equal(view, before[1][1:])
    assert model[1].weight.data_ptr() == model[0].weight.data_ptr()


def test_views_made_inside_stay_views_of_the_weights():
    model = nn.Linear(3, 4)
    validation, params = kept_of(model)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        with validation.weights_kept(params, moved):
            made = model.weight.t()
        assert torch.equal(model.weight, before[0]) and torch.equal(made, before[0].t())
        with torch.no_grad():
            model.weight[0, 0] += 1.0
            before[0][0, 0] += 1.0
        assert torch.equal(made, before[0].t())


@pytest.mark.parametrize("aliased", [False, True])
@pytest.mark.parametrize("writing", [False, True])
def test_weights_come_back_after_an_error(aliased, writing):
    model = nn.Linear(3, 4)
    view = model.weight.detach() if aliased else None
    validation, params = kept_of(model)
    before, places = [p.detach().clone() for p in params], [p.data_ptr() for p in params]

    def write(memory):
        moved(memory)
        if writing:
            raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"), validation.weights_kept(params, write):
        raise RuntimeError("wrong")
    assert all(map(torch.equal, params, before)) and [p.data_ptr() for p in params] == places
    assert view is None or torch.equal(view, before[0])


def test_weights_of_a_cuda_graph_move_in_place():
    model = nn.Linear(3, 4)

    def forward(x):
        raise AssertionError

    forward.__module__, model.forward = "torch.cuda.graphs", forward  # as make_graphed_callables leaves a module behind
    validation, params = kept_of(model)
    places = [p.data_ptr() for p in params]
    with validation.weights_kept(params, moved):
        assert [p.data_ptr() for p in params] == places


class Spare(nn.Module):
    """Has a layer that no training pass uses."""

    def __init__(self):
        super().__init__()
        self.first, self.spare, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, spare=False):
        x = torch.tanh(self.first(x))
        return self.last(self.spare(x) if spare else x)


@pytest.mark.parametrize("schedule", ["lookahead", "midpoint", "gauss"])
def test_scores_do_not_depend_on_where_the_weights_are(schedule):
    """A parameter that someone has a view of is moved in place; one without a gradient stays."""

    def scores(viewed):
        torch.manual_seed(0)
        model = Spare()
        views = [p.detach() for p in model.parameters()] if viewed else []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        x, y = torch.randn(12, 5), torch.randint(0, 3, (12,))
        run = ag.InRun(model, optimizer, lambda: F.cross_entropy(model(x[8:], spare=True), y[8:]), schedule)
        for _ in range(13):
            run.batch(range(8))
            F.cross_entropy(model(x[:8]), y[:8]).backward()
            optimizer.step()
            optimizer.zero_grad()
        run.close()
        return torch.from_numpy(run.scores().total), [p.detach().clone() for p in model.parameters()], views

    (one, weights, _), (other, others, views) = scores(False), scores(True)
    assert torch.equal(one, other) and len(one) == 8
    assert all(map(torch.equal, weights, others)) and all(map(torch.equal, others, views))
