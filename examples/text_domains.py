"""Weighs text domains: which of them should a small language model for prose be trained on?

    python examples/text_domains.py

The domains are Python's documentation, its sources, and documentation with garbled letters; the target is held-out documentation.
"""

import argparse

import torch
from torch.nn import functional as F

import adam_ghost
from adam_ghost import use
from adam_ghost.demo.data import VOCABULARY, load_corpus
from adam_ghost.demo.model import GPT

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--ledger", default="runs/domains")
options = parser.parse_args()

torch.manual_seed(0)
corpus = load_corpus(samples=320, targets=16, length=49, seed=0)
model = GPT(VOCABULARY, 48, layers=1, width=48, heads=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)


def loss_of(x):
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


ledger = adam_ghost.LedgerWriter(options.ledger, describe=lambda i: {"group": corpus.domains[i]}, restart=True)
with adam_ghost.InRun(model, optimizer, lambda: loss_of(corpus.target), "lookahead", ledger=ledger) as run:
    for _ in range(options.steps):
        ids = torch.randint(len(corpus.tokens), (16,))
        run.batch(ids)
        loss_of(corpus.tokens[ids]).backward()
        optimizer.step()
        optimizer.zero_grad()

# early steps teach what all texts have in common: the later half tells the domains apart
found = use.weights(options.ledger, steps=(options.steps // 2, options.steps))
for row in found.rows:
    interval = f"standardised score {row.value:+.3f}  (95%: {row.low:+.3f} to {row.high:+.3f})"
    what = f"no weight suggested: {row.reason}" if row.reason else f"suggested weight {row.weight:.2f}"
    print(f"{row.group:10} {interval}, {row.samples} samples; {what}")
