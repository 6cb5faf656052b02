"""Ids for samples that have none: their places in the data set, on their way through somebody else's loader."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset


class Numbered(Dataset):
    """A data set whose samples, mappings, have their place in it as a column more."""

    def __init__(self, dataset: Any, column: str):
        self.dataset, self.column = dataset, column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Mapping[str, Any]:
        return {**self.dataset[index], self.column: int(index)}

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled, in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


def lacks_ids(dataset: Any, column: str) -> bool:
    """Whether ``dataset`` has places, and mappings without ``column`` there."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return False
    names = getattr(dataset, "column_names", None)
    if isinstance(names, list):
        return column not in names
    first = dataset[0] if len(dataset) else None
    return isinstance(first, Mapping) and column not in first


class Remembered:
    """A loader's batch sampler that remembers which places it gave, batch by batch, whoever loads them."""

    def __init__(self, batches: Any):
        self.batches = batches
        self.given: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.given.clear()
        for batch in self.batches:
            self.given.append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)


def remember(loader: Any) -> Remembered | None:
    """Has ``loader`` remember its batches' places; None where it has no places, or returns batches in another order."""
    if not isinstance(loader, DataLoader) or not getattr(loader, "in_order", True):
        return None
    if isinstance(loader.batch_sampler, Remembered):
        return loader.batch_sampler
    if not isinstance(loader.batch_sampler, BatchSampler) or isinstance(loader.dataset, IterableDataset):
        return None
    found = Remembered(loader.batch_sampler)
    _exchange(loader, found)
    return found


def forget(loader: DataLoader) -> None:
    """Takes off what ``remember`` has put on ``loader``."""
    if isinstance(loader.batch_sampler, Remembered):
        _exchange(loader, loader.batch_sampler.batches)


def _exchange(loader: DataLoader, batches: Any) -> None:
    object.__setattr__(loader, "batch_sampler", batches)  # DataLoader itself refuses, as its other arguments might not fit
