"""Choosing within a Trainer's steps: it ends where the plain loop that chooses ends."""

import pytest
import torch
from classifier import N, data, net, val_loss
from torch import nn

import adam_ghost as ag
from adam_ghost.use import select

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
BATCH, LR = 6, 1e-2


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
