"""nanoGPT's training loop (accumulation, clipping, warm-up and cosine decay, autocast, scaler) with two lines added.

    python examples/nanogpt_loop.py --steps 60

Learns the Python documentation that comes with Python; half of one in eight samples is noise. Prints who helped.
"""

import argparse
import math
import pydoc_data.topics
from contextlib import nullcontext

import torch
from torch.nn import functional as F

import adam_ghost
from adam_ghost.demo.model import GPT

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
parser.add_argument("--schedule", choices=("midpoint", "gauss", "lookahead"), default="midpoint")
options = parser.parse_args()

# data: 256 fixed samples, so that each is met several times
torch.manual_seed(1337)
device = "cuda" if torch.cuda.is_available() else "cpu"
block_size, batch_size, accumulation = 64, 8, 2
text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")))
starts = torch.randint(len(text) - block_size - 1, (256 + 16,))
samples = torch.stack([text[s : s + block_size + 1] for s in starts])
train, val = samples[:256].clone(), samples[256:].to(device)
train[::8, block_size // 2 :] = torch.randint(32, 127, train[::8, block_size // 2 :].shape)

model = GPT(128, block_size, layers=2, width=64, heads=2, dropout=0.1).to(device)
decay = [p for p in model.parameters() if p.dim() >= 2]
no_decay = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
)
ctx = nullcontext() if options.dtype == "float32" else torch.autocast(device, getattr(torch, options.dtype))
scaler = torch.amp.GradScaler(device, enabled=options.dtype == "float16")


def loss_of(x):
    with ctx:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def learning_rate(step, warmup=10, top=3e-3, bottom=3e-4):
    if step < warmup:
        return top * (step + 1) / warmup
    return bottom + 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, options.steps - warmup))) * (top - bottom)


run = adam_ghost.InRun(model, optimizer, lambda: loss_of(val), options.schedule)  # added

for step in range(options.steps):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    for _ in range(accumulation):
        ids = torch.randint(len(train), (batch_size,))
        run.batch(ids)  # added
        loss = loss_of(train[ids].to(device)) / accumulation
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if step % 20 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item() * accumulation:.3f}")

found = run.scores()
noisy = [s for i, s in zip(found.ids, found.standardized, strict=True) if i % 8 == 0]
clean = [s for i, s in zip(found.ids, found.standardized, strict=True) if i % 8]
print(f"mean standardised score of {len(clean)} clean samples: {sum(clean) / len(clean):+.3f}")
print(f"mean standardised score of {len(noisy)} half noise:    {sum(noisy) / len(noisy):+.3f}")
print("most helpful:", ", ".join(f"{i} ({s:+.4f})" for i, s in run.top(3, value="total")))
print("most harmful:", ", ".join(f"{i} ({s:+.4f})" for i, s in run.top(3, harmful=True, value="total")))
