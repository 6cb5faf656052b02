"""Finds mislabelled training images: scikit-learn's digits, of which one in ten gets a wrong label.

    python examples/mislabelled_digits.py

Trains a small network with AdamW, and looks at the samples whose standardised scores are lowest.
"""

import argparse
import struct
import zlib

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import adam_ghost

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--ledger", default="runs/digits")
options = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(x))
train, val = order[:1400], order[1400:]
label = y.clone()
wrong = train[torch.rand(len(train)) < 0.1]
label[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape)) % 10


def png(pixels):
    """Eight by eight grey values as a PNG, for the report."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = b"".join(b"\0" + bytes(int(255 * v) for v in line) for line in pixels.view(8, 8))
    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def describe(i):
    return {"group": f"labelled {label[i]}", "text": f"a {y[i]}, labelled {label[i]}", "image": png(x[i])}


model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
ledger = adam_ghost.LedgerWriter(options.ledger, describe=describe, restart=True)
with adam_ghost.InRun(model, optimizer, lambda: F.cross_entropy(model(x[val]), y[val]), ledger=ledger) as run:
    for epoch in range(options.epochs):
        run.epoch = epoch
        for ids in train[torch.randperm(len(train))].split(50):
            run.batch(ids)
            F.cross_entropy(model(x[ids]), label[ids]).backward()
            optimizer.step()
            optimizer.zero_grad()

suspects = adam_ghost.open_ledger(options.ledger).top(len(wrong), harmful=True, value="standardized")["sample"].to_pylist()
found = sum(bool(label[i] != y[i]) for i in suspects)
print(f"{len(wrong)} of {len(train)} labels are wrong")
print(f"of the {len(wrong)} most harmful samples {found} are mislabelled: {found / len(wrong):.0%}")
print(f"more: adam-ghost report {options.ledger}")
