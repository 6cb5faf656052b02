"""Ids become what they mean, or are refused by name: no two that differ are merged, no one sample is split into many."""

import numpy as np
import pytest
import torch

from adam_ghost.ledger.ids import normalise

MEANT = {
    "list": ([3, 1], [3, 1]),
    "range": (range(2), [0, 1]),
    "strings": (["a", "é"], ["a", "é"]),
    "tensor": (torch.tensor([3, 1]), [3, 1]),
    "column": (torch.tensor([[3], [1]]), [3, 1]),
    "array": (np.array([3, 1], dtype=np.uint8), [3, 1]),
    "array of strings": (np.array(["a", "bc"]), ["a", "bc"]),
    "0-d tensors": ([torch.tensor(3), torch.tensor(1)], [3, 1]),
    "0-d arrays": ([np.array(3), np.int64(1)], [3, 1]),
    "numpy's strings": ([np.str_("a")], ["a"]),
    "tuples": ([("a", 1), ("a", torch.tensor(2))], [("a", 1), ("a", 2)]),
    "generator": ((i for i in (3, 1)), [3, 1]),
    "empty": ([], []),
}


@pytest.mark.parametrize("name", MEANT)
def test_turned_into_what_they_mean(name):
    ids, meant = MEANT[name]
    found = normalise(ids)
    assert found == meant
    assert [type(i) for i in found] == [type(i) for i in meant]


REFUSED = {
    "bool": ([1, True], TypeError, "got bool True"),
    "mask": (torch.tensor([True, False]), TypeError, "got bool True"),
    "float": ([1.0], TypeError, "got float 1.0"),
    "floats": (torch.tensor([1.5]), TypeError, "got float 1.5"),
    "0-d float": ([torch.tensor(1.0)], TypeError, "got Tensor tensor"),
    "none": ([None], TypeError, "got NoneType None"),
    "string": ("abc", TypeError, "got str abc"),
    "one": (7, TypeError, "got int 7"),
    "0-d": (torch.tensor(7), TypeError, r"got Tensor tensor\(7\)"),
    "set": ({1, 2}, TypeError, "got set"),
    "dict": ({1: 2}, TypeError, "got dict"),
    "lists": ([[1], [2]], TypeError, r"got list \[1\]"),
    "matrix": (torch.zeros(2, 3, dtype=int), ValueError, r"Tensor \[2, 3\]"),
    "bytes": ([b"a"], TypeError, "got bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    ids, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        normalise(ids)
