"""Real text from this machine: Python's own documentation and sources, and a share of the documentation garbled."""

import inspect
import random
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

# large, well-commented modules of the standard library, in every installation
_SOURCES: tuple[str, ...] = (
    "argparse",
    "asyncio.base_events",
    "datetime",
    "decimal",
    "doctest",
    "inspect",
    "logging",
    "mailbox",
    "optparse",
)
_SOURCES += ("pickle", "smtplib", "subprocess", "tarfile", "threading", "typing", "unittest.mock", "zipfile")
VOCABULARY = 128  # ASCII
DOMAINS = ("prose", "code", "corrupted")


@dataclass
class Corpus:
    """Training samples of ``length`` characters with their domain and source, and a held-out target of prose."""

    tokens: Tensor  # [N, length]
    texts: list[str]
    domains: list[str]
    sources: list[str]
    target: Tensor  # [M, length], from documentation that no training sample comes from


def load_corpus(samples: int, targets: int, length: int, seed: int) -> Corpus:
    """Half prose, three tenths code, and two tenths prose of which two characters in five were garbled, as a bad scan would."""
    rng = random.Random(seed)
    topics = {name: _ascii(text) for name, text in _documentation().items()}
    names = sorted(name for name, text in topics.items() if len(text) > 2 * length)
    rng.shuffle(names)
    held_out, names = names[: len(names) // 5], names[len(names) // 5 :]
    code = {name: _ascii(inspect.getsource(import_module(name))) for name in _SOURCES}

    plan = ["prose"] * (samples // 2) + ["code"] * (samples * 3 // 10)
    plan += ["corrupted"] * (samples - len(plan))
    rng.shuffle(plan)
    texts, sources = [], []
    for domain in plan:
        pool, choices = (code, list(code)) if domain == "code" else (topics, names)
        text, source = _excerpt(rng, pool, choices, length)
        texts.append(_garble(rng, text) if domain == "corrupted" else text)
        sources.append(source)
    target = [_excerpt(rng, topics, held_out, length)[0] for _ in range(targets)]
    return Corpus(_encode(texts), texts, plan, sources, _encode(target))


def _documentation() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def _ascii(text: str) -> str:
    return text.encode("ascii", "replace").decode()


def _excerpt(rng: random.Random, pool: dict[str, str], names: list[str], length: int) -> tuple[str, str]:
    """Text of words, not of the rules and frames of tables; and where it is from."""
    while True:
        name = rng.choices(names, [len(pool[n]) for n in names])[0]
        start = rng.randrange(len(pool[name]) - length)
        text = pool[name][start : start + length]
        if sum(c.isalpha() for c in text) > 0.6 * length:
            return text, name


def _garble(rng: random.Random, text: str) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz ,.;"
    return "".join(rng.choice(letters) if rng.random() < 0.4 else c for c in text)


def _encode(texts: list[str]) -> Tensor:
    return torch.tensor([list(text.encode()) for text in texts])
