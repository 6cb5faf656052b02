"""TRL's packed data sets, once more with the ids, which packing drops: one to each token."""

import copy
from typing import Any


def pack_ids(trainer: Any, dataset: Any, column: str) -> Any:
    """``trainer.train_dataset`` with a ``column`` of lists, whose each token it is; ``dataset`` is what it was packed from.

    Raises:
        ValueError: the rows packed of ``dataset`` are not those of the trainer.
    """
    from trl import pack_dataset

    args = trainer.args
    whole = copy.copy(args)  # neither cut nor shuffled: what comes before packing
    whole.max_length, whole.shuffle_dataset = None, False
    found = trainer._prepare_dataset(dataset, trainer.processing_class, whole, False, None, "train")
    found = found.map(lambda sample: {column: [sample[column]] * len(sample["input_ids"])})
    found = found.select_columns(["input_ids", "labels", column])
    found = found.shuffle(seed=args.seed) if args.shuffle_dataset else found
    found = pack_dataset(found, args.max_length, args.packing_strategy)
    found = found.shuffle(seed=args.seed) if args.shuffle_dataset else found
    if not _same_tokens(found, trainer.train_dataset):
        raise ValueError("dataset must be what the trainer was given as train_dataset: packed again, it gives other rows")
    return found


def _same_tokens(found: Any, expected: Any) -> bool:
    if len(found) != len(expected):
        return False
    rows = (x.select_columns(["input_ids"]).with_format("arrow").iter(1000) for x in (found, expected))
    return all(a["input_ids"].combine_chunks().equals(b["input_ids"].combine_chunks()) for a, b in zip(*rows, strict=True))
