"""``schedule="window"``: scores are the derivative through the whole window, and training stays what it was."""

import pytest
import torch
from torch import nn
from trainings import Training, apart, conv, gpt, mlp, pictures, texts

import adam_ghost as ag

EXACT = 1e-9  # float64, a few dozen steps of arithmetic, differences of large numbers among them


def adam(kind=torch.optim.AdamW, **options):
    return lambda model: kind([p for p in model.parameters() if p.requires_grad], **{"lr": 1e-2} | options)


def groups(model):
    head = {"params": list(model[-1].parameters()), "lr": 3e-2, "betas": (0.7, 0.95), "weight_decay": 0.3}
    return torch.optim.Adam([{"params": list(model[:-1].parameters())}, head], lr=1e-2)


OPTIONS = {
    "AdamW": adam(),
    "Adam": adam(torch.optim.Adam),
    "Adam-decay": adam(torch.optim.Adam, weight_decay=0.2),
    "AdamW-decay": adam(weight_decay=0.5),
    "amsgrad": adam(amsgrad=True, betas=(0.8, 0.6)),
    "maximize": adam(maximize=True, weight_decay=0.1),
    "all": adam(torch.optim.Adam, maximize=True, amsgrad=True, weight_decay=0.1, betas=(0.8, 0.6)),
    "betas": adam(betas=(0.5, 0.9), eps=1e-3),
    "single": adam(foreach=False, capturable=False),
    "foreach": adam(foreach=True),
    "fused": adam(fused=True),
    "tensor-lr": adam(lr=torch.tensor(1e-2, dtype=torch.float64)),
    "groups": groups,
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_every_option_of_the_optimizer(make):
    training = Training(mlp(), make).attach().train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT


@pytest.mark.parametrize("feedback", ["double", "forward"])
@pytest.mark.parametrize("model, data", [(mlp, None), (gpt, texts), (conv, pictures)], ids=["mlp", "gpt", "conv"])
def test_every_model_and_exact_feedback(model, data, feedback):
    training = Training(model(), adam(), **{"data": data} if data else {}).attach(feedback=feedback).train(6)
    assert apart(training.scores(), training.credit(1, 4, 6)) <= EXACT
