"""Small calls contracted by one call of the extension: the definitions' sums, whatever the layout, and what it leaves is left."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import adam_ghost as ag
from adam_ghost import extension
from adam_ghost.scores import contract, definition, together

pytestmark = pytest.mark.skipif(bool(extension.reason("cpu")), reason=extension.reason("cpu") or "built")
needs_pairs = pytest.mark.skipif(not extension.built["cpu_bfloat16"], reason="this processor does not multiply pairs of bfloat16")
LINEAR, LAYER, RMS, EMBEDDING = range(4)
N, K = 3, 2
EPS = 1e-5
# [T, d_in, d_out]: blocks of six rows and of sixteen columns, and what is left of them
SHAPES = {"one token": (1, 16, 8), "blocks": (4, 32, 24), "odd": (7, 17, 5), "narrow": (5, 1, 1), "no token": (0, 4, 4)}


@contextmanager
def threads_of(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def normal(*shape):
    return torch.randn(shape)


def strided(*shape):
    return torch.randn(*shape[:-2], shape[-1], 2 * shape[-2])[..., ::2].mT


def expanded(*shape):
    return torch.randn(*shape[:-1], 1).expand(shape)


def contracted(*calls, largest=1 << 30, products=1 << 30, half=1 << 30):
    sums = torch.zeros(N, K, dtype=torch.float64)
    left = extension.C.contract_calls([(*call, EPS, -1)[:7] for call in calls], sums, largest, products, half)
    return sums, left


def close(found, exact, terms):
    """``terms``: products in each sum, whose rounding errors are independent."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(found, exact, rtol=0, atol=float(4 * eps * terms**0.5 * (1 + exact.abs().max())))


def wide(x):
    return None if x is None else x.double()


@pytest.mark.parametrize("made", [normal, strided, expanded])
@pytest.mark.parametrize("parts", ["both", "weight", "bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_linear(shape, parts, made):
    T, d_in, d_out = shape
    a, b = made(N, T, d_in), made(N, T, d_out)
    P = None if parts == "bias" else made(K, d_out, d_in)
    P_bias = None if parts == "weight" else made(K, d_out)
    found, left = contracted((LINEAR, a, b, P, P_bias))
    exact = definition.contract(wide(a), wide(b), torch.zeros(K, d_out, d_in).double() if P is None else wide(P), wide(P_bias))
    close(found, exact.sum(1), T * d_in * d_out + 1)
    assert left == []


@pytest.mark.parametrize("kind", [LAYER, RMS])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_norm(shape, with_bias, kind):
    T, d, _ = shape
    x, b, P, P_bias = normal(N, T, d), normal(N, T, d), normal(K, d), normal(K, d) if with_bias else None
    found, left = contracted((kind, x, b, P, P_bias))
    exact = definition.norm_score(wide(x), wide(b), wide(P), wide(P_bias), EPS, ("layer", "rms")[kind - LAYER])
    close(found, exact.sum(1), T * d + 1)
    assert left == []


@pytest.mark.parametrize("lie", ["row-major", "as a language model's inputs", "transposed"])
@pytest.mark.parametrize("padding", [None, 2])
def test_embedding(padding, lie):
    rows, inputs, columns = (torch.randint(0, 5, shape) for shape in ((N, 7), (N, 8), (7, N)))
    indices = {"row-major": rows, "as a language model's inputs": inputs[:, :-1], "transposed": columns.mT}[lie]
    b, P = normal(N, 7, 6), normal(K, 5, 6)
    sums = torch.zeros(N, K, dtype=torch.float64)
    call = EMBEDDING, indices, b, P, None, 0.0, -1 if padding is None else padding
    assert extension.C.contract_calls([call], sums, 1, 1, 1) == []
    close(sums, definition.embedding_score(indices, wide(b), wide(P), padding).sum(1), 7 * 6)


def test_calls_add_up():
    calls = [(LINEAR, normal(N, 4, 8), normal(N, 4, 8), normal(K, 8, 8), None) for _ in range(3)]
    together, _ = contracted(*calls)
    assert torch.equal(together, sum(contracted(call)[0] for call in calls))


# [T, d_in, d_out]: tiles of 256 by 128 and what is left of them, an odd number of outputs, rows of more than a chunk
LARGE = {"tiles": (50, 150, 300), "odd": (7, 130, 257), "narrow": (3, 5, 1), "one token": (1, 128, 256), "wide": (60, 17, 513)}


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_pairs)])
@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_large(shape, half):
    T, d_in, d_out = shape
    a, b, P, P_bias = normal(N, T, d_in), normal(N, T, d_out), normal(K, d_out, d_in), normal(K, d_out)
    found, left = contracted((LINEAR, a, b, P, P_bias), half=0 if half else 1 << 30)
    of = lambda x: x.bfloat16().double() if half else x.double()  # noqa: E731
    exact = definition.contract(a.double(), of(b), of(P)) + definition.contract(a.double(), b.double(), 0 * of(P), P_bias.double())
    close(found, exact.sum(1), T * d_in * d_out + 1)
    assert left == []


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_pairs)])
def test_a_row_is_scored_the_same_in_any_company(half):
    """Its bits depend on neither the threads, nor the rows beside it, nor whether these are enough to copy P for."""
    a, b, P = normal(200, 3, 130), normal(200, 3, 300), normal(K, 300, 130)
    found = []
    for threads in (1, 2, 3):
        with threads_of(threads):
            sums = torch.zeros(200, K, dtype=torch.float64)
            extension.C.contract_calls([(LINEAR, a, b, P, None, 0.0, -1)] * 2, sums, 1 << 30, 1 << 30, 0 if half else 1 << 30)
            found.append(sums)
    alone = torch.zeros(1, K, dtype=torch.float64)
    extension.C.contract_calls([(LINEAR, a[7:8], b[7:8], P, None, 0.0, -1)] * 2, alone, 1 << 30, 1 << 30, 0 if half else 1 << 30)
    assert all(torch.equal(x, found[0]) for x in found)
    assert torch.equal(alone[0], found[0][7])


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=needs_pairs)])
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("where", ["input", "output gradient", "direction"])
def test_what_is_no_number_stays_with_its_sample_and_target(where, rows, half):
    a, b, P = normal(N, rows, 21), normal(N, rows, 19), normal(K, 19, 21)
    {"input": a, "output gradient": b, "direction": P}[where][1] = float("nan")
    found, _ = contracted((LINEAR, a, b, P, None), half=0 if half else 1 << 30)
    exact = definition.contract(a, b, P).sum(1)
    assert torch.equal(found.isnan(), exact.isnan())


LEFT = {
    "float64": lambda: (LINEAR, normal(N, 4, 8).double(), normal(N, 4, 8), normal(K, 8, 8), None),
    "bfloat16": lambda: (LINEAR, normal(N, 4, 8), normal(N, 4, 8).bfloat16(), normal(K, 8, 8), None),
    "samples": lambda: (LINEAR, normal(N + 1, 4, 8), normal(N + 1, 4, 8), normal(K, 8, 8), None),
    "tokens": lambda: (LINEAR, normal(N, 3, 8), normal(N, 4, 8), normal(K, 8, 8), None),
    "features": lambda: (LINEAR, normal(N, 4, 7), normal(N, 4, 8), normal(K, 8, 8), None),
    "targets": lambda: (LINEAR, normal(N, 4, 8), normal(N, 4, 8), normal(K + 1, 8, 8), None),
    "bias": lambda: (LINEAR, normal(N, 4, 8), normal(N, 4, 8), normal(K, 8, 8), normal(K, 7)),
    "norm's weight": lambda: (LAYER, normal(N, 4, 8), normal(N, 4, 8), normal(K, 7), None),
    "a subclass": lambda: (LINEAR, nn.Buffer(normal(N, 4, 8)), normal(N, 4, 8).as_subclass(Subclass), normal(K, 8, 8), None),
    "on no device": lambda: (LINEAR, normal(N, 4, 8), normal(N, 4, 8).to("meta"), normal(K, 8, 8), None),
    "an index out of range": lambda: (EMBEDDING, torch.full((N, 4), 5), normal(N, 4, 8), normal(K, 5, 8), None),
    "a negative index": lambda: (EMBEDDING, torch.full((N, 4), -1), normal(N, 4, 8), normal(K, 5, 8), None),
    "large": lambda: (LINEAR, normal(N, 1, 8), normal(N, 1, 9), normal(K, 9, 8), None),
    "long": lambda: (LINEAR, normal(N, 5, 8), normal(N, 5, 8), normal(K, 8, 8), None),
}


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_what_it_does_not_take_is_left(make):
    good = LINEAR, normal(N, 4, 8), normal(N, 4, 8), normal(K, 8, 8), None
    found, left = contracted(good, make(), good, largest=64, products=N * 4 * 8 * 8 * K)
    assert left == [1]
    assert torch.equal(found, 2 * contracted(good)[0])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "vectors, pairs, tiles", [(False, "", False), (True, "", False), (True, "avx512_bf16", False), (True, "avx512_bf16", True)]
)
def test_what_is_left_to_the_library_by_its_size(monkeypatch, vectors, pairs, tiles, half):
    monkeypatch.setitem(extension.built, "cpu", "avx512" if vectors else "baseline")
    monkeypatch.setitem(extension.built, "cpu_bfloat16", pairs)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles})
    left, rounded = together._products.__wrapped__(half)
    assert (left < together.EVERY) == (not vectors or (half and (tiles or not pairs)))
    assert (rounded < together.EVERY) == bool(half and pairs and not tiles)


def test_scores_must_be_float64():
    with pytest.raises(ValueError, match="scores: expected float64"):
        extension.C.contract_calls([], torch.zeros(N, K), 1, 1, 1)


class Model(nn.Module):
    """All that is taken, and a layer that is not."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.rms = nn.Embedding(9, 8, padding_idx=3), nn.LayerNorm(8), nn.RMSNorm(8)
        self.linear, self.conv, self.out = nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 3, bias=False)
        self.linear.weight.requires_grad_(False)

    def forward(self, x):
        h = self.linear(self.norm(self.embed(x)))
        return self.out(self.rms(self.conv(h.mT).mT))


def test_the_same_scores_without_it(monkeypatch):
    torch.manual_seed(0)
    model, x, y = Model(), torch.randint(0, 9, (5, 6)), torch.randint(0, 3, (5, 6))
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()))
    loss = lambda: nn.functional.cross_entropy(model(x).mT, y)  # noqa: E731
    cache = ag.LayerCache(model, loss)
    with cache:
        loss().backward()
    taken = []
    monkeypatch.setattr(contract, "score_together", lambda *a: taken.append(together.score_together(*a)) or taken[-1])
    scores = ag.attribute(cache, optimizer)
    assert [call.name for call in taken[0][1]] == ["conv"]
    monkeypatch.setattr(contract, "score_together", lambda calls, P, asked: (None, calls))
    torch.testing.assert_close(scores, ag.attribute(cache, optimizer), rtol=1e-5, atol=1e-7 * float(scores.abs().max()))
