"""Every function of torch: where the batch is said to be in its result, it is; what is in no table never keeps it."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adam_ghost.capture import rules
from adam_ghost.capture.batch import Batch, Blocks
from adam_ghost.capture.names import functions
from adam_ghost.capture.pointwise import FACTORIES, POINTWISE, POINTWISE_IF_TWO
from adam_ghost.capture.rows import JOINS, MOVES, WRITES, Rows

n = 4  # every size is n, or n * n, on purpose
TABLES = [POINTWISE, POINTWISE_IF_TWO, rules.RULES, rules.RESHAPES, rules.LISTS, rules.PRODUCTS, rules.EINSUM]
BY_INDEX = {f for table in (MOVES, JOINS, WRITES) for f in table}  # rows may come to lie anywhere
KNOWN = {f for table in TABLES for f in table} | BY_INDEX


def overridable():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(torch.overrides.get_testing_overrides())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_in_no_table_loses_the_batch(axis):
    unknown = [f for f in overridable() if f not in KNOWN and f not in FACTORIES]
    assert len(unknown) > 300
    for f in [*unknown, torch.ops.aten.relu, torch.ops.aten.relu.default, len, object()]:
        batch = Batch()
        batch.n = n
        x = torch.ones(n, n, n, requires_grad=True)
        batch.tag(x, Blocks(axis, 1))
        for args in [(x,), (x, x), (x, 0), (x, 1)]:
            assert batch.infer(f, args, {}, [x], x * 1) is None, f


def test_factories_hold_no_samples():
    x = torch.ones(n, requires_grad=True)
    for f in FACTORIES:
        args = {"new_tensor": ([1.0],), "new_full": ((n,), 1.0)}.get(f.__name__, ((n,),))
        assert not f(x, *args).requires_grad


def tensors(ndim, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*[n] * ndim, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return {"float": x, "int": (x * 9).long() + 1, "bool": x > 0.5}[kind]


INDEX = torch.tensor([2, 0, 3, 1])


def calls(ndim, kind):
    """Arguments to try on any function: what fits is called."""
    x, y, z = (tensors(ndim, seed, kind) for seed in (1, 2, 3))
    last = tensors(1, 4, kind)
    index = (tensors(ndim, 5, "int") % n).long()
    yield from ((x,), (x, y), (x, y, z), (x, last), (last, x), (x, 2), ([x, y],), (z > 3, x, y))
    yield from ((x, x > 0.5, 2), (x, x > 0.5, y), (x, -1, y), (2, x), (x, [n]), (x, n), (x, [n, n]), (x, index), (x, y, last))
    for dim in (*range(ndim), -1):
        yield from ((x, dim), (x, 2, dim), (x, y, dim), (x, [1, 3], dim), ([x, y], dim), (x, dim, 1), (x, dim, index))
        yield from ((x, dim, INDEX), (x, dim, index, y), (x, dim, INDEX, y), (x, dim, 0, n), (x, dim, index, y, "sum"))
        yield from ((x, 0.5, dim), (x, index, dim), (x, None, dim), (x, dim, [2, 2]), (x, dim, True), (x, 1.0, False, 1e-10, dim))
        yield from (([x, y, z], dim), (x, y, 1.0, 1e-6, True), (x, dim, INDEX, 2.0), (x, dim, n, 1))
    for dims in itertools.permutations(range(ndim), 2):
        yield from ((x, dims), (x, *dims), (x, 1, dims), (x, None, dims), (x, 0, *dims), (x, [1, 1], dims), (x, 2, dims))
    yield from ((x, tuple(range(ndim))[::-1]), (x, (n * n, *[n] * (ndim - 2))), (x, (*[n] * (ndim - 2), n * n)), (x, -1))
    yield from ((x, [1, 1]), (x, [1, -1]), (x, [0, 0, 1, -1]), (x, y, 1), (x, [1] * ndim), (x, *[n] * ndim), (x, 3, 1, 1))
    yield from ((x, (n, n), (n, n)), (x, None, 1.0), (x, 2, 2), (x, 1, n), (x, (2, 2), 1), (x, y, None, None, False))
    yield from ((x, last, last), (x, last, last, None, None, False), (x, tensors(3, 6, kind), last), (x, tensors(2, 6, kind), last))


def special():
    """Arguments that no pattern has."""
    r = lambda *shape: torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)  # noqa: E731
    x3, x4, square = r(n, n, n), r(n, n, n, n), r(n, n)
    yield from ((F.conv1d, (x3, r(n, n, 3))), (F.conv2d, (x4, r(n, n, 3, 3))), (F.conv_transpose1d, (x3, r(n, n, 1))))
    yield from ((F.conv1d, (square, r(n, n, 3))), (F.grid_sample, (x4, r(n, n, n, 2))), (F.affine_grid, (r(n, 2, 3), (n, 1, n, n))))
    yield from ((F.bilinear, (x3, x3 + 1, x3)), (F.embedding, (INDEX.expand(n, n), square)), (F.one_hot, (INDEX.expand(n, n),)))
    yield from (
        (F.embedding_bag, (INDEX.expand(n, n), square)),
        (F.cross_entropy, (x3, INDEX.expand(n, n), None, None, -1, None, "none")),
    )
    yield from ((F.fold, (r(n, n * n, n), (2, 2), (1, 1))), (F.unfold, (x4, (2, 2))), (F.unfold, (x3, (2, 2))))
    yield from (
        (torch.einsum, (equation, x3, x3 + 1)) for equation in ("abc,abd->abcd", "abc,acb", "abc,dec->abde", "...c,...c->...")
    )
    yield from (
        (torch.gru_cell, (square, square + 1, r(3 * n, n), r(3 * n, n))),
        (F.interpolate, (x3, 2 * n)),
        (F.interpolate, (x4, n)),
    )
    yield from (
        (F.scaled_dot_product_attention, (x4, x4 + 1, x4 + 2)),
        (F.pixel_shuffle, (x4, 2)),
        (torch.tensordot, (x3, x3 + 1, 1)),
    )
    yield from ((F.layer_norm, (x3, (n, n))), (F.rms_norm, (x3, (n,))), (F.group_norm, (x3, 2)), (F.instance_norm, (x3,)))
    yield from ((F.batch_norm, (x3, r(n), r(n))), (F.local_response_norm, (x3, 3)), (F.channel_shuffle, (x4, 2)))
    yield from (
        (Tensor.__getitem__, (x3, i)) for i in (slice(None), (slice(None), 1), (..., 0), (None, ..., INDEX), (slice(None), INDEX))
    )
    yield from (
        (Tensor.__getitem__, (x3, i))
        for i in ((0, slice(None), INDEX), (INDEX,), INDEX > 1, (slice(1, None),), True, (slice(0, 4), None))
    )
    yield from ((f, (x3, (INDEX,), x3 + 1)) for f in (torch.index_put, Tensor.index_put, torch.index_put_, Tensor.index_put_))
    yield from ((f, (x3, (n, n, n))) for f in (torch.broadcast_to, Tensor.broadcast_to))
    yield from ((f, (x3, x3 > 0.5)) for f in (torch.masked_select, Tensor.masked_select))
    yield from ((torch.t, (square,)), (Tensor.t, (square,)))
    yield from ((torch.quantile, (x3, torch.linspace(0, 1, n).double(), d)) for d in range(3))
    yield from ((torch.nanquantile, (x3, 0.5, d)) for d in range(3))


def flat(args):
    return [t for x in args for t in (x if isinstance(x, list) else [x]) if isinstance(t, Tensor)]


def copied(args, change=lambda i, t: t):
    """The arguments with every tensor cloned, the ``i``-th of them after ``change``."""
    count = itertools.count()
    one = lambda x: change(next(count), x).clone() if isinstance(x, Tensor) else x  # noqa: E731
    return tuple([one(y) for y in x] if isinstance(x, list) else one(x) for x in args)


def signature(args):
    """What torch's argument parser goes by."""
    kind = lambda x: x.dtype if isinstance(x, Tensor) else type(x)  # noqa: E731
    return tuple(tuple(map(kind, x)) if isinstance(x, (list, tuple)) else kind(x) for x in args)


def results(f, args):
    torch.default_generator.manual_seed(0)
    out = f(*args)
    return [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)]


def changed(x, axis, sample):
    """``x`` with another sample's rows in place of one's, and the bits of neither."""
    rows = x.movedim(axis, 0).clone()
    rows[sample] = ~rows[sample] if x.dtype == torch.bool else rows[sample - 1].flip(-1) if rows.ndim > 1 else rows[sample - 1]
    if x.dtype == torch.float64:
        rows[sample] *= 0.9
    return rows.movedim(0, axis)


def permuted(axis, ndim):
    """The tag of samples that are in the order of ``INDEX``."""
    return Rows(INDEX.view([n if d == axis else 1 for d in range(ndim)]), 1)


def verify(f, args, wrong, refused):
    """Tries every place for the batch; returns how often it was shown to be where the rules say, in blocks and by an index.

    Lists the ``wrong`` ones.

    ``refused`` collects the signatures that ``f`` does not have, which are not tried again.
    """
    try:
        out = results(f, copied(args))
    except TypeError:
        refused.add((f, signature(args)))
        return 0, 0
    except Exception:
        return 0, 0
    found, shown = flat(args), [0, 0]
    places = list(itertools.product(range(max((t.ndim for t in found), default=0)), (False, True)))
    for carriers in {tuple(range(len(found))), *((i,) for i in range(len(found)))}:
        for axis, by_index in places:
            if any(axis >= found[i].ndim or found[i].shape[axis] != n for i in carriers):
                continue
            mine = copied(args)
            batch = Batch()
            batch.n = n
            for i in carriers:
                batch.tag(flat(mine)[i], permuted(axis, found[i].ndim) if by_index else Blocks(axis, 1))
            try:
                out = results(f, mine)
            except Exception:
                continue
            tags = [batch.infer(f, mine, {}, flat(mine), x, i) for i, x in enumerate(out)]
            if not any(tags):
                continue
            row = INDEX.tolist().index(1) if by_index else 1  # the second sample's
            other = copied(args, lambda i, t, axis=axis, row=row, mine=carriers: changed(t, axis, row) if i in mine else t)
            before = results(f, copied(args))
            try:
                after = results(f, other)
            except Exception:  # not positive definite any more
                continue
            for x, y, tag in zip(before, after, tags, strict=True):
                if tag is None:
                    continue
                a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (x, y))
                if isinstance(tag, Rows):
                    others = (tag.samples != 1).expand(x.shape)
                    a, b = a[others].double(), b[others].double()
                else:
                    rows = [k for k in range(x.shape[tag[0]]) if k // tag[1] != 1]
                    a, b = (t.movedim(tag[0], 0)[rows].double() for t in (a, b))
                if not torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True):
                    wrong.append((f, args, axis, carriers, tag))
                shown[isinstance(tag, Rows)] += 1
    return shown


# memory not written to, and results that are told by another test
NOT_TRIED = {torch.empty_like, Tensor.__setitem__, Tensor.cuda, Tensor.cpu, Tensor.pin_memory}


@pytest.mark.filterwarnings("ignore")
def test_rules_by_experiment():
    """One sample is exchanged; the others' rows of the result stay."""
    shown, wrong, refused = {f: [0, 0] for f in KNOWN}, [], set()

    def show(f, args):
        shown[f] = [a + b for a, b in zip(shown[f], verify(f, args, wrong, refused), strict=True)]

    for f, args in special():
        show(f, args)
    for kind, ndim in (("float", 3), ("int", 2)):
        for k, args in enumerate(calls(ndim, kind)):
            types = signature(args)
            for f in KNOWN - NOT_TRIED:
                scarce = shown[f][0] < 8 or (f in BY_INDEX and shown[f][1] < 6)
                due = scarce and k < (3 if f in POINTWISE else 300 if ndim == 3 else 0)
                if due and (f, types) not in refused:
                    show(f, args)
    assert not wrong, [(f, [getattr(t, "shape", t) for t in args], *rest) for f, args, *rest in wrong][:20]
    missing = sorted({getattr(f, "__name__", str(f)) for f, counts in shown.items() if not any(counts)})
    assert len(missing) < 120, missing
    unmoved = sorted({getattr(f, "__name__", str(f)) for f in BY_INDEX - NOT_TRIED if not shown[f][1]})
    assert not unmoved, unmoved


def test_a_rule_is_of_one_place(monkeypatch):
    """torch.polar is elementwise, torch.linalg.polar of 2.14 is not: what comes to be elsewhere under a known name is unknown."""
    newer = lambda x: x  # noqa: E731
    for place in (torch.linalg, torch.special, torch.fft):
        monkeypatch.setattr(place, "polar", newer, raising=False)
    assert newer not in functions("polar") and torch.polar in functions("polar")
    assert functions("linalg.polar") == [newer]
