"""LoRA fine-tuning with Hugging Face's Trainer, attributed by one callback.

    python examples/lora_trainer.py

A tiny GPT-2 with random weights (nothing is downloaded) learns sentences; every fourth sample is noise.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import adam_ghost
from adam_ghost.integrations.hf import AttributionCallback

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--ledger", default="runs/lora")
options = parser.parse_args()

torch.manual_seed(0)
text = ("the quick brown fox jumps over the lazy dog. " * 3).encode()
sentences = [torch.tensor(list(text[i : i + 24])) for i in range(45)]
noise = [torch.randint(97, 123, (24,)) for _ in range(15)]
samples = [{"input_ids": t, "labels": t, "sample_id": f"sentence-{i}"} for i, t in enumerate(sentences)]
samples += [{"input_ids": t, "labels": t, "sample_id": f"noise-{i}"} for i, t in enumerate(noise)]
target = torch.stack(sentences[::5])

config = GPT2Config(vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
lora = LoraConfig(r=8, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
model = get_peft_model(GPT2LMHeadModel(config), lora)
args = TrainingArguments(
    output_dir="runs/lora-trainer",
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=1e-2,
    use_cpu=True,
    report_to=[],
    save_strategy="no",
    logging_steps=10,
)
trainer = Trainer(model, args, train_dataset=samples)
ledger = adam_ghost.LedgerWriter(options.ledger, describe=lambda i: {"group": i.split("-")[0]}, restart=True)
AttributionCallback(lambda m: m(input_ids=target, labels=target).loss, ledger=ledger).attach(trainer)
trainer.train()

for g in adam_ghost.open_ledger(options.ledger).groups(value="standardized").to_pylist():
    print(f"{g['group']:9} mean standardised score {g['value']:+.3f} over {g['samples']} samples")
