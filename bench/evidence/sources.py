"""Which of 320 training texts did a held-out one come from: asked for verbatim, with shuffled words, paraphrased by rule?"""

import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.demo.data import VOCABULARY
from bench.evidence import scoring
from bench.evidence.tasks import TASKS, Task

QUERIES = 8
# what paraphrase replaces, where it stands
SYNONYMS = {
    "the": "a", "is": "was", "are": "were", "and": "as well as", "or": "and also", "of": "from", "to": "towards", "in": "within",
    "for": "of", "that": "which", "this": "that", "be": "become", "with": "by", "if": "when", "not": "never", "self": "this",
    "return": "yield", "import": "use", "def": "function", "None": "null", "True": "yes", "False": "no", "value": "result",
    "object": "thing", "function": "routine", "class": "kind", "method": "way", "name": "label", "string": "text", "can": "may",
}  # fmt: skip
KINDS = ("verbatim", "shuffled", "paraphrased")


def asked(text: str, kind: str, rng: random.Random) -> str:
    """As long as ``text``: the end is cut off or filled up with the beginning."""
    words = text.split(" ")
    if kind == "shuffled":
        rng.shuffle(words)
    elif kind == "paraphrased":
        words = [SYNONYMS.get(w, w) for w in words]
        for k in range(0, len(words) - 1, 3):
            words[k], words[k + 1] = words[k + 1], words[k]
    made = " ".join(words)
    return (made + " " + made)[: len(text)]


def lexical(train: list[str], queries: list[str]) -> Tensor:
    """``[N, K]``: cosines of the counts of three characters: what needs no model."""

    def counts(text: str) -> Counter[str]:
        return Counter(text[i : i + 3] for i in range(len(text) - 2))

    of_train, of_queries = ([counts(t) for t in texts] for texts in (train, queries))
    words = {w: k for k, w in enumerate(sorted({w for c in (*of_train, *of_queries) for w in c}))}

    def rows(found: list[Counter[str]]) -> Tensor:
        out = torch.zeros(len(found), len(words))
        for k, c in enumerate(found):
            out[k, [words[w] for w in c]] = torch.tensor([float(x) for x in c.values()])
        return F.normalize(out)

    return rows(of_train) @ rows(of_queries).T


def decoded(samples: tuple[Tensor, ...]) -> list[str]:
    x, y = samples
    return ["".join(map(chr, [*a, b])) for a, b in zip(x.tolist(), y[:, -1].tolist(), strict=True)]


def measure(seed: int) -> dict[str, Any]:
    """Recall at 1 and 10 and the mean reciprocal rank of the true source, per kind and way."""
    t: Task = TASKS["texts"](seed, 3e-3, epochs=6)
    texts, rng = decoded(t.samples), random.Random(seed)
    source = rng.sample((~t.bad).nonzero().squeeze(1).tolist(), QUERIES)
    made = {kind: [asked(texts[i], kind, rng) for i in source] for kind in KINDS}
    tokens = torch.tensor([[min(ord(c), VOCABULARY - 1) for c in q] for kind in KINDS for q in made[kind]])
    t.held_out, t.each_target = (tokens[:, :-1], tokens[:, 1:]), True
    ways = {"characters in common": torch.cat([lexical(texts, made[kind]) for kind in KINDS], 1).double()}
    rules = ("one step, SGD rule", "one step, midpoint")
    found = scoring.along(t, rules)
    ways |= {name: found[name] for name in (*rules, scoring.STANDARDISED, scoring.TRACIN)}
    ways[f"{scoring.DEFAULT}, no feedback"] = scoring.windows(t, 32, 32, "none")
    ways |= scoring.after_training(t)
    rows = []
    for name, scores in ways.items():
        ahead = scores > scores[torch.tensor(source * len(KINDS)), range(scores.shape[1])]
        rank = ahead.sum(0) + 1  # [K]
        for k, kind in enumerate(KINDS):
            r = rank[k * QUERIES : (k + 1) * QUERIES].double()
            found = {"recall at 1": float((r == 1).double().mean()), "recall at 10": float((r <= 10).double().mean())}
            rows.append({"way": name, "kind": kind, "MRR": float((1 / r).mean())} | found)
    return {"rows": rows}
