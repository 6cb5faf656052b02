"""Frameworks that run the loop themselves, in several processes; each function returns this process's scores, by id."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import adam_ghost as ag

N, BATCH, VOCABULARY = 16, 2, 13  # samples, those of a process in a step, tokens


def data(uneven: bool = False) -> tuple[Tensor, Tensor]:
    """Token sequences and labels; ``uneven``: of which not all count."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(VOCABULARY, (N, 6), generator=g)
    y = x.clone()
    for i in range(N if uneven else 0):
        y[i, 1 : 1 + i % 4] = -100
    return x, y


def gpt() -> Any:
    """A small GPT2 whose head is tied to its embedding."""
    import transformers

    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": VOCABULARY}
    quiet = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    config = transformers.GPT2Config(**sizes, **quiet, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return transformers.GPT2LMHeadModel(config)


def val_loss(model: nn.Module) -> Tensor:
    x, y = data()
    return model(input_ids=x[:5], labels=y[:5]).loss


def windows(schedule: str) -> dict[str, int]:
    return {"window": 2, "ahead": 1} if schedule == "window" else {}


def read(run: Any) -> dict[int, float]:
    found = run.scores()
    return dict(zip(found.ids, found.total.tolist(), strict=True))


@contextlib.contextmanager
def launched(shard: bool = False) -> Iterator[None]:
    """As torchrun sets the environment, where there are several processes; has Accelerate ``shard`` on CPUs, too."""
    from accelerate import state

    several = distributed.is_initialized()
    rank, size = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none"}
    with mock.patch.dict(os.environ, {k: str(x) for k, x in names.items()} if several else {}):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        backend = "gloo", state.DistributedType.MULTI_GPU
        ways = {"_prepare_backend": lambda *args: backend, "set_device": lambda self: setattr(self, "device", torch.device("cpu"))}
        as_on_gpus = mock.patch.multiple(state.PartialState, **ways)
        try:
            with as_on_gpus if shard else contextlib.nullcontext():
                yield
        finally:
            state.AcceleratorState._reset_state(reset_partial_state=True)


def accelerated(shard: bool, batch: int = BATCH) -> tuple[dict[int, float], bool]:
    """By Accelerate's ``prepare``, with accumulation and clipping."""
    import accelerate
    from accelerate.utils import FullyShardedDataParallelPlugin

    x, y = data()
    with launched(shard):
        plugin = None
        if shard:
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
                cpu_ram_efficient_loading=False,
            )  # fmt: skip
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
        model = gpt().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(N), x, y), batch_size=batch)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        with ag.InRun(model, optimizer.optimizer, lambda: val_loss(model)) as run:
            for _ in range(2):
                for ids, a, b in loader:
                    with accelerator.accumulate(model):
                        run.batch(ids)
                        accelerator.backward(model(input_ids=a, labels=b).loss)
                        if accelerator.sync_gradients:
                            accelerator.clip_grad_norm_(model.parameters(), 0.05)
                        optimizer.step()
                        optimizer.zero_grad()
        return read(run), isinstance(model, FSDPModule)


def trained(shard: bool, schedule: str, folder: str, batch: int = BATCH) -> tuple[dict[int, float], bool]:
    """By the Trainer, whose loss is the mean over the tokens of all processes and micro-batches."""
    import transformers

    from adam_ghost.integrations.hf import AttributionCallback

    x, y = data(uneven=True)
    samples = [{"input_ids": x[i], "labels": y[i], "sample_id": i} for i in range(N)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(samples)

    with launched(shard):
        options: dict[str, Any] = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "use_cpu": True}
        if shard:
            wrapped = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "cpu_ram_efficient_loading": False}
            options |= {"fsdp": True, "fsdp_config": wrapped}
        args = transformers.TrainingArguments(
            output_dir=folder, learning_rate=1e-2, lr_scheduler_type="constant", per_device_train_batch_size=batch,
            optim="adamw_torch", weight_decay=0.0, report_to=[], disable_tqdm=True, save_strategy="no", **options,
        )  # fmt: skip
        model = gpt().double()
        callback = AttributionCallback(val_loss, schedule=schedule, **windows(schedule))
        trainer = InOrder(model, args, train_dataset=samples, data_collator=transformers.default_data_collator)
        callback.attach(trainer)
        trainer.train()
        return read(callback.run), isinstance(model, FSDPModule)


def lit(strategy: str, schedule: str, batch: int = BATCH) -> tuple[dict[int, float], bool]:
    """By Lightning, with ``DDPStrategy`` or ``ModelParallelStrategy``; ``auto`` in one process."""
    import lightning
    from lightning.pytorch import strategies
    from torch.distributed.fsdp import fully_shard

    from adam_ghost.integrations.lightning import AttributionCallback

    x, y = data()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt().double()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits

        def training_step(self, given: dict, index: int) -> Tensor:
            logits = self(given["x"])
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), given["y"][:, 1:].flatten())

        def configure_model(self) -> None:
            if strategy == "model_parallel":
                for part in (*self.model.transformer.h, self):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def validate(self) -> Tensor:
            logits = self(x[:5])
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:5, 1:].flatten())

    samples = [{"x": x[i], "y": y[i], "sample_id": i} for i in range(N)]
    with launched():
        size = distributed.get_world_size() if distributed.is_initialized() else 1
        how: Any = {
            "auto": lambda: "auto",
            "ddp": strategies.DDPStrategy,
            "model_parallel": lambda: strategies.ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
        }[strategy]()
        callback = AttributionCallback(Module.validate, schedule=schedule, **windows(schedule))
        module = Module()
        sampler = torch.utils.data.DistributedSampler(samples, shuffle=False) if size > 1 else None
        loader = torch.utils.data.DataLoader(samples, batch_size=batch, sampler=sampler)
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", devices=size, strategy=how, callbacks=[callback], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, loader)
        return read(callback.run), isinstance(module, FSDPModule)


def titan(schedule: str, folder: str) -> tuple[dict[int, float], list, list]:
    """By the example of torchtitan's loop; also what the scores of each step add up to, and should."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
    import torchtitan_loop

    run = torchtitan_loop.train(schedule, None, folder)
    return read(run), [s.score_sum for s in run.steps], [s.total for s in run.steps]
