"""Frameworks on a tiny model: their scores and weights are those of the plain loop with the same batches."""

import copy

import numpy as np
import pytest
import torch
from classifier import N, data, net, val_loss
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag

pytest.importorskip("transformers")
# trainings end where they end, seldom with a window
pytestmark = pytest.mark.filterwarnings("ignore:adam_ghost. the run ended")
BATCH = 4


def plain(model, batches, lr=1e-2, clip=None, accumulation=1, autocast=False, **options):
    """The plain loop's scores over ``batches``; the model is trained in place."""
    x, y = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)

    def val():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # as Accelerate's wrapping of the model does
            return val_loss(model)

    loss_of = lambda ids: model(x=x[ids], labels=y[ids])["loss"] / accumulation  # noqa: E731
    with ag.InRun(model, optimizer, val, train_loss=loss_of, **options) as run:
        for k, ids in enumerate(batches):
            run.batch(ids, inputs=ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(ids)
            loss.backward()
            if (k + 1) % accumulation == 0:
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return run.scores()


def assert_same(found, expected, rtol=1e-5):
    ours, theirs = (dict(zip(s.ids, s.total, strict=True)) for s in (found, expected))
    assert ours.keys() == theirs.keys() and len(ours) == N
    scale = max(abs(v) for v in theirs.values())
    np.testing.assert_allclose([ours[i] for i in theirs], list(theirs.values()), rtol=rtol, atol=rtol * scale)


def in_order(epochs):
    return [list(range(s, s + BATCH)) for _ in range(epochs) for s in range(0, N, BATCH)]


def hf_trainer(model, folder, callback, attach=True, base=None, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    x, y = data()
    samples = [{"x": x[i], "labels": y[i], "sample_id": i} for i in range(N)]

    class InOrder(base or transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(samples)

    options = {"num_train_epochs": 2, "max_grad_norm": 0.0, "save_strategy": "no"} | options
    args = transformers.TrainingArguments(
        output_dir=str(folder), learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=BATCH, use_cpu=True,
        optim="adamw_torch", weight_decay=0.0, report_to=[], logging_steps=1, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = InOrder(model, args, train_dataset=samples, data_collator=transformers.default_data_collator)
    if attach:
        callback.attach(trainer)
    return trainer


def test_an_ordinary_trainer(tmp_path):
    """No column of ids, and one that the model does not know: ids are places, and what is unused is taken off as ever."""
    from adam_ghost.integrations.hf import AttributionCallback

    model, other, callback = net(), net(), AttributionCallback(val_loss)
    trainer = hf_trainer(model, tmp_path, callback, attach=False)
    trainer.train_dataset = [{"x": s["x"], "labels": s["labels"], "title": {"not": "for a model"}} for s in trainer.train_dataset]
    callback.attach(trainer)
    trainer.train()
    assert_same(callback.run.scores(), plain(other, in_order(2)))


HF = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulation": 2}),
    "clipping": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "bf16": ({"bf16": True}, {"autocast": True}),
}


@pytest.mark.parametrize("case", HF)
def test_trainer(tmp_path, case):
    from adam_ghost.integrations.hf import AttributionCallback

    options, loop = HF[case]
    model, other = net(), net()
    callback = AttributionCallback(val_loss, ledger=tmp_path / "ledger")
    trainer = hf_trainer(model, tmp_path, callback, **options)
    reported = []

    class Reporter(pytest.importorskip("transformers").TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    trainer.add_callback(Reporter())
    trainer.train()
    assert_same(callback.run.scores(), plain(other, in_order(2), **loop))
    assert any("attribution/score_sum" in line for line in reported)
    assert any("attribution/score_sum" in line for line in trainer.state.log_history)
    with ag.open_ledger(tmp_path / "ledger") as ledger:
        assert ledger.scores().num_rows == 2 * N


WINDOW = {"schedule": "window", "window": 3, "ahead": 2}


@pytest.mark.parametrize("case", ["plain", "accumulation", "clipping"])
def test_trainer_windows(tmp_path, case):
    """The Trainer's own loss is run again; what it logs and counts on the way, as TRL's trainers do, is not counted twice."""
    from adam_ghost.integrations.hf import AttributionCallback

    class Counting(pytest.importorskip("transformers").Trainer):
        _metrics, _total_train_tokens = None, 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self._metrics = self._metrics or {"train": {"seen": []}}
            self._metrics["train"]["seen"].append(len(inputs["labels"]))
            self._total_train_tokens += 1
            self.log({"mine": 1.0})
            labels = inputs.pop("labels")  # as the Trainer's own does under label smoothing
            loss = F.cross_entropy(model(**inputs)["logits"], labels)
            return (loss, None) if return_outputs else loss

    options, loop = HF[case]
    model, other = net(), net()
    callback = AttributionCallback(val_loss, ledger=tmp_path / "ledger", **WINDOW)
    trainer = hf_trainer(model, tmp_path, callback, base=Counting, **options)
    trainer.train()
    assert_same(callback.run.scores(), plain(other, in_order(2), **WINDOW, **loop))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    batches = 2 * N // BATCH
    assert trainer._metrics["train"]["seen"] == [BATCH] * batches and trainer._total_train_tokens == batches
    assert sum("mine" in line for line in trainer.state.log_history) == batches


@pytest.mark.filterwarnings("ignore:adam_ghost. windows of 3 steps")  # an audit's word on the first of all steps
def test_trainer_windows_of_a_gpt(tmp_path):
    """Dropout, ``num_items_in_batch`` over accumulated batches, and an evaluation at the end, which leaves its mode behind."""
    transformers = pytest.importorskip("transformers")
    from adam_ghost.integrations.hf import AttributionCallback

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    tokens = torch.randint(0, 11, (8, 6))
    masked = tokens.masked_fill(torch.rand(tokens.shape) < 0.3, -100)
    samples = [{"input_ids": t, "labels": y, "sample_id": i} for i, (t, y) in enumerate(zip(tokens, masked, strict=True))]
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        num_train_epochs=3, report_to=[], save_strategy="no", eval_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    val_loss = lambda model: model(input_ids=tokens[:2], labels=tokens[:2]).loss  # noqa: E731
    callback = AttributionCallback(val_loss, audit_every=1, audit_samples=3, **WINDOW)
    data = {"train_dataset": samples, "eval_dataset": samples[:2]}
    trainer = transformers.Trainer(transformers.GPT2LMHeadModel(config), args, **data)
    callback.attach(trainer)
    trainer.train()
    assert not trainer.model.training
    assert set(callback.run.scores().ids) == set(range(8))
    audits = [s.audit.r for s in callback.run.steps if s.audit is not None]
    assert audits and min(audits) > 0.8  # the first step of an optimizer is the least linear


def test_trainer_windows_need_the_trainer(tmp_path):
    from adam_ghost.integrations.hf import AttributionCallback

    callback = AttributionCallback(val_loss, **WINDOW)
    trainer = hf_trainer(net(), tmp_path, callback, attach=False)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match=r"callback\.attach\(trainer\)"):
        trainer.train()

    class Direct(pytest.importorskip("transformers").Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = model(**inputs)["loss"]
            loss.backward()
            return loss.detach()

    callback = AttributionCallback(val_loss, **WINDOW)
    with pytest.raises(ValueError, match=r"compute_loss, which this Trainer did not call"):
        hf_trainer(net(), tmp_path, callback, base=Direct).train()


def test_trainer_resumes(tmp_path):
    from adam_ghost.integrations.hf import AttributionCallback

    callback = AttributionCallback(val_loss, ledger=tmp_path / "ledger")
    hf_trainer(net(), tmp_path, callback, save_strategy="steps", save_steps=5).train()
    whole = callback.run.scores()
    again = AttributionCallback(val_loss, ledger=tmp_path / "ledger")
    hf_trainer(net(), tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_same(again.run.scores(), whole)
    with ag.open_ledger(tmp_path / "ledger") as ledger:
        assert ledger.scores().num_rows == 2 * N


def test_trainer_without_ids(tmp_path):
    from adam_ghost.integrations.hf import AttributionCallback

    callback = AttributionCallback(val_loss, column="another")
    with pytest.raises((KeyError, TypeError), match=r"another|sample_id"):
        hf_trainer(net(), tmp_path, callback).train()


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    x, y = data()
    model, other = net(), net()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(N), x, y), BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with ag.InRun(model, optimizer.optimizer, lambda: val_loss(model)) as run:
        for _ in range(2):
            for ids, a, b in loader:
                with accelerator.accumulate(model):
                    run.batch(ids)
                    accelerator.backward(model(x=a, labels=b)["loss"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
        found = run.scores()
    assert_same(found, plain(other, in_order(2), accumulation=2, clip=0.05))


@pytest.mark.parametrize("schedule", ["midpoint", "window"])
@pytest.mark.parametrize("case", ["plain", "accumulation", "clipping"])
def test_lightning(tmp_path, case, schedule):
    lightning = pytest.importorskip("lightning.pytorch")
    from adam_ghost.integrations.lightning import AttributionCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return self.net(x=x, labels=labels)

        def training_step(self, batch, index):
            labels = batch.pop("labels")
            loss = self(**batch, labels=labels)["loss"]
            self.log("mine", loss)
            return {"loss": loss}

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)

    x, y = data()
    samples = [{"x": x[i], "labels": y[i], "sample_id": i} for i in range(N)]
    options = {"accumulation": {"accumulate_grad_batches": 2}, "clipping": {"gradient_clip_val": 0.05}}.get(case, {})
    loop = {"accumulation": {"accumulation": 2}, "clipping": {"clip": 0.05}}.get(case, {})
    windows = WINDOW if schedule == "window" else {}
    callback = AttributionCallback(val_loss, **windows)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(samples, BATCH))
    assert_same(callback.run.scores(), plain(net(), in_order(2), **windows, **loop))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("where", ["fit", "module", "data module"])
def test_an_ordinary_lightning_module(tmp_path, where, workers):
    """Tuples for batches, no ids, a network that training_step calls by its name: ids are places, shuffled as they would be."""
    lightning = pytest.importorskip("lightning.pytorch")
    from adam_ghost.integrations.lightning import AttributionCallback

    x, y = data()
    loader = lambda: torch.utils.data.DataLoader(  # noqa: E731
        torch.utils.data.TensorDataset(x, y), BATCH, shuffle=True, num_workers=workers,
        generator=torch.Generator().manual_seed(5), multiprocessing_context="fork" if workers else None,
    )  # fmt: skip

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = net(), []

        def training_step(self, batch, index):
            inputs, labels = batch
            self.seen += [int((x == row).all(1).nonzero()) for row in inputs]
            return self.net(x=inputs, labels=labels)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)

    class Data(lightning.LightningDataModule):
        train_dataloader = lambda self: loader()  # noqa: E731

    def fit(*callbacks):
        module = (type("Module", (Module,), {"train_dataloader": lambda self: loader()}) if where == "module" else Module)()
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        given = loader()
        trainer.fit(module, *{"fit": [given], "data module": [Data()], "module": []}[where])
        assert type(given.batch_sampler) is torch.utils.data.BatchSampler
        return module

    callback = AttributionCallback(lambda module: val_loss(module.net))
    module, without = fit(callback), fit()
    assert module.seen == without.seen and module.seen[:N] != module.seen[N:]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), without.parameters(), strict=True))
    batches = [module.seen[s : s + BATCH] for s in range(0, 2 * N, BATCH)]
    assert_same(callback.run.scores(), plain(net(), batches))
    assert "train_dataloader" not in vars(module)


def test_lightning_asks_for_the_network_by_name(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from adam_ghost.integrations.lightning import AttributionCallback

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def training_step(self, batch, index):
            raise AssertionError("is never reached")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[AttributionCallback(val_loss)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\(encoder, head\).*name the part with net="):
        trainer.fit(Two(), torch.utils.data.DataLoader(list(zip(*data(), strict=True)), BATCH))


def test_lightning_with_several_optimizers(tmp_path):
    """Manual optimization by two AdamWs that share the parameters out, which is what one AdamW does."""
    lightning = pytest.importorskip("lightning.pytorch")
    from adam_ghost.integrations.lightning import AttributionCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net(), False

        def forward(self, x, labels):
            return self.net(x=x, labels=labels)

        def training_step(self, batch, index):
            optimizers = self.optimizers()
            self.manual_backward(self(**batch)["loss"])
            for each in optimizers:
                each.step()
                each.zero_grad()

        def configure_optimizers(self):
            params = list(self.parameters())
            return [torch.optim.AdamW(half, lr=1e-2, weight_decay=0.0) for half in (params[::2], params[1::2])]

    x, y = data()
    samples = [{"x": x[i], "labels": y[i], "sample_id": i} for i in range(N)]
    callback = AttributionCallback(val_loss)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(samples, BATCH))
    assert_same(callback.run.scores(), plain(net(), in_order(2)))


def test_lightning_windows_log_nothing_twice(tmp_path):
    from adam_ghost.integrations.lightning import AttributionCallback

    seen = []

    def call(module, batch):
        seen.append(len(batch["labels"]))
        module.log("mine", 1.0, on_step=True, on_epoch=False)
        module.log_dict({"ours": 1.0}, on_step=True, on_epoch=False)
        module.logger.log_metrics({"by hand": 1.0}, step=0)
        return module(**batch)

    callback = AttributionCallback(val_loss, **WINDOW)
    lines = lightning_fit(tmp_path, callback, call, log_every_n_steps=1)
    batches = N // BATCH
    assert len(seen) > 2 * batches
    for name in ("mine", "ours", "by hand"):
        assert sum(name in metrics for _, metrics in lines) == batches


def test_lightning_windows_refuse_manual_optimization(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from adam_ghost.integrations.lightning import AttributionCallback

    class Manual(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net(), False

        def training_step(self, batch, index):
            raise AssertionError("is never reached")

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[AttributionCallback(val_loss, **WINDOW)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"automatic_optimization is off"):
        trainer.fit(Manual(), torch.utils.data.DataLoader([{"sample_id": 0}], 1))


def lightning_fit(tmp_path, callback, call, tuples=False, **options):
    """One epoch over the samples in batches, with a logger; what was logged, by step."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x, labels):
            return self.net(x=x, labels=labels)

        def training_step(self, batch, index):
            return call(self, batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    class Logger(CSVLogger):
        def log_metrics(self, metrics, step=None):
            lines.append((step, dict(metrics)))

    lines = []
    x, y = data()
    samples = [(i, x[i], y[i]) if tuples else {"x": x[i], "labels": y[i], "sample_id": i} for i in range(N)]
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=Logger(tmp_path), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(samples, BATCH))
    return lines


def test_lightning_logs_when_it_is_asked_to(tmp_path):
    from adam_ghost.integrations.lightning import AttributionCallback

    callback = AttributionCallback(val_loss)
    lines = lightning_fit(tmp_path, callback, lambda m, b: m(**b), log_every_n_steps=2, accumulate_grad_batches=1)
    ours = [(step, m) for step, m in lines if "attribution/gap" in m]
    assert [step for step, _ in ours] == [2, 4, 6]
    assert all(m["attribution/coverage"] == 1 and m["attribution/gap"] < 1e-5 for _, m in ours)
    lines = lightning_fit(
        tmp_path, AttributionCallback(val_loss), lambda m, b: m(**b), log_every_n_steps=1, accumulate_grad_batches=2
    )
    assert [step for step, m in lines if "attribution/gap" in m] == [1, 2, 3]


def test_lightning_messages_name_the_cure(tmp_path):
    from adam_ghost.integrations.lightning import AttributionCallback

    whole = lambda m, b: m.net(x=b[1], labels=b[2])  # noqa: E731
    with pytest.raises(KeyError, match=r"'who'.*it is a list.*give the callback ids="):
        lightning_fit(tmp_path, AttributionCallback(val_loss, column="who"), whole, tuples=True)
    with pytest.raises(RuntimeError, match=r"in Lightning, name it: net="):
        lightning_fit(tmp_path, AttributionCallback(val_loss, ids=lambda b: b[0]), whole, tuples=True)
    callback = AttributionCallback(lambda m: val_loss(m.net), ids=lambda b: b[0], net="net")
    lightning_fit(tmp_path, callback, whole, tuples=True)
    assert len(callback.run.steps) == N // BATCH


def test_lightning_with_a_scaler_and_an_overflow(tmp_path):
    """Lightning clears gradients after the batch begins: a step that the scaler skips must leave nothing to the next."""
    from lightning.pytorch.plugins import MixedPrecision

    from adam_ghost.integrations.lightning import AttributionCallback

    calls = []

    def call(module, batch):
        calls.append(1)
        loss = module(**batch)["loss"]
        return {"loss": loss * float("inf") if len(calls) == 3 else loss}

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    callback = AttributionCallback(val_loss)
    lightning_fit(tmp_path, callback, call, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    scores = callback.run.scores()
    assert np.isfinite(scores.total).all()
    assert set(scores.ids) == set(range(N)) - {8, 9, 10, 11}


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(2)
    model = peft.get_peft_model(net(), config)
    other = copy.deepcopy(model)
    found = plain(model, in_order(2))
    # the oracle: every sample's gradient by itself, for the one step that follows
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    again = plain_steps(other, optimizer, in_order(2))
    assert_same(found, again)
    assert not any("base_layer" in n for n, p in model.named_parameters() if p.requires_grad)


def plain_steps(model, optimizer, batches):
    """Scores by ``< P , g_i >`` with one backward pass per sample, from the parts that are not under test."""
    from adam_ghost import AdamState
    from adam_ghost.run.totals import Totals
    from adam_ghost.step.direction import form_direction, validation_gradient
    from adam_ghost.step.validation import Validation

    x, y = data()
    params, totals = {name: p for name, p in model.named_parameters() if p.requires_grad}, Totals()
    for ids in batches:
        each = [torch.autograd.grad(model(x=x[[i]], labels=y[[i]])["loss"] / len(ids), list(params.values())) for i in ids]
        grads = {name: sum(g) for name, g in zip(params, zip(*each, strict=True), strict=True)}
        state, validation = AdamState.of(optimizer), Validation(lambda: val_loss(model), model)
        val = validation_gradient(state, params, grads, validation, "midpoint")
        P = form_direction(state, params, grads, val, "secant").P
        scores = [[sum(float((P[name] * g).sum()) for name, g in zip(params, gs, strict=True))] for gs in each]
        totals.add(ids, np.array(scores))
        for name, p in params.items():
            p.grad = grads[name]
        optimizer.step()
    return totals.read(True)
