"""Choosing within a Trainer's steps: it ends where the plain loop that chooses ends."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.use import select

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
N, BATCH, LR = 24, 6, 1e-2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.second(torch.tanh(self.first(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator)


def val_loss(model):
    x, y = data()
    return model(x=x[:6], labels=y[:6])["loss"]


def trainer_of(model, folder, **options):
    x, y = data()
    samples = [{"x": x[i], "labels": y[i]} for i in range(N)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(samples)

    args = transformers.TrainingArguments(
        str(folder), learning_rate=LR, lr_scheduler_type="constant", per_device_train_batch_size=BATCH, use_cpu=True,
        optim="adamw_torch", report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no", num_train_epochs=2,
        max_grad_norm=0.05, **options,
    )  # fmt: skip
    return InOrder(model, args, train_dataset=samples)


def net():
    torch.manual_seed(1)
    return Net()


@pytest.mark.parametrize("fraction", [0.5, None])
def test_trainer(tmp_path, fraction):
    from adam_ghost.integrations.hf_selection import SelectionCallback

    model, other = net(), net()
    trainer = trainer_of(model, tmp_path)
    callback = SelectionCallback(val_loss, fraction=fraction).attach(trainer)
    trainer.train()
    x, y = data()
    optimizer = torch.optim.AdamW(other.parameters(), lr=LR, weight_decay=0.0)
    cache = ag.LayerCache(other, lambda: val_loss(other))
    for start in [*range(0, N, BATCH)] * 2:
        with cache:
            other(x=x[start : start + BATCH], labels=y[start : start + BATCH])["loss"].backward()
        found = select(cache, optimizer, fraction)
        nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    left = found.weights == 0
    assert 0 < left.sum() < BATCH
    last = trainer.state.log_history[-2]
    assert last["selection/chosen"] == pytest.approx(1 - float(left.double().mean()))
    assert last["selection/score_left_out"] == pytest.approx(float(found.scores[left].sum()), rel=1e-3)
    assert torch.equal(callback.last.weights, found.weights) or fraction is None


@pytest.mark.parametrize(
    "options, message",
    [({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"), ({}, r"callback.attach\(trainer\)")],
)
def test_trainer_refuses(tmp_path, options, message):
    from adam_ghost.integrations.hf_selection import SelectionCallback

    trainer = trainer_of(net(), tmp_path, **options)
    if options:
        SelectionCallback(val_loss).attach(trainer)
    else:
        trainer.add_callback(SelectionCallback(val_loss))
    with pytest.raises(ValueError, match=message):
        trainer.train()
