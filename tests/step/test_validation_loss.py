"""A validation loss that says nothing of the model that is trained."""

import copy

import pytest
import torch
from torch import nn

import adam_ghost


@pytest.mark.parametrize("schedule", ["midpoint", "lookahead"])
def test_of_a_copy_of_the_model_is_named_once(schedule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    other = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(6, 5), torch.randint(0, 3, (6,))
    loss = lambda of: nn.functional.cross_entropy(of(x), y)  # noqa: E731
    run = adam_ghost.InRun(model, optimizer, lambda: loss(other), schedule)
    with pytest.warns(UserWarning, match="val_loss depends on none of the parameters that are trained") as told:
        for _ in range(3):
            run.batch(range(6))
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len([w for w in told if "val_loss depends" in str(w.message)]) == 1
    run.close()
    assert not run.scores().total.any()
