"""Follows the batch through a forward pass: which dimension of which tensor counts the samples.

A module call is attributed sample by sample along that dimension. Sizes alone cannot tell it: a position embedding called
on ``arange(T)`` looks like a batch when ``T == n``. So tags follow the data, from the model's inputs through every torch
function that Python calls: elementwise ones, and those that have a rule. What no rule knows, and what mixes samples (a mean
over the batch, a flip of it, a product of samples with samples), loses its tag and is marked as lost: nothing is guessed.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adam_ghost.capture import attention, rules
from adam_ghost.capture.declared import DECLARED, FOLLOWED, custom_function, is_opaque
from adam_ghost.capture.names import counterpart
from adam_ghost.capture.pointwise import POINTWISE, POINTWISE_IF_TWO
from adam_ghost.capture.rows import JOINS, MOVES, NOBODY, WRITES, Packing, Rows, shrunk


class Blocks(NamedTuple):
    """Samples in blocks, in order: ``size(axis) == n * rows``, sample ``i`` at ``i * rows`` to ``(i + 1) * rows``.

    ``tokens``: where samples are packed in rows, the dimensions that count a row's tokens, ``axis`` itself where its blocks do.
    A pair of tokens, as attention has it, has two.
    """

    axis: int
    rows: int
    tokens: frozenset[int] = frozenset()


Followed = Blocks | Rows
# what a call tells of its outputs: (axis, rows), as above; packed tokens are the first dimension but the rows', or their blocks
Tag = tuple[int, int] | Rows

_FIRST = ("input", "tensor", "tensors", "self", "A", "logits", "x")  # what torch calls the first argument
_UNKNOWN = (-1, -1)


class Batch:
    """Tags of the tensors of one forward pass; ``n`` is known from the first call on."""

    look = True  # whether to look into an index, where that waits for no device

    def __init__(self, packing: Packing | None = None):
        self.n = -1  # until then
        self.packing = packing
        self._tags = WeakIdKeyDictionary()  # None marks a lost tensor
        self.nodes: set[Any] = set()  # of the graph, at which samples passed
        self.doubts: list[Tensor] = []  # [] bool: whether something that was taken for granted is not so
        self.moved = False  # whether an index had to tell where samples came to lie, or they were lost: values may decide that
        self._constant = False  # whether the result now looked at carries no gradient

    @property
    def tokens(self) -> int:
        """To a row of the batch, where samples are packed in rows, else 0."""
        return 0 if self.packing is None or self.n < 1 else self.packing.tokens // self.n

    @property
    def alone(self) -> bool:
        """Whether there is but one sample, whose rows may meet."""
        return self.n == 1 and self.packing is None

    def owners(self, rows: Rows) -> Tensor:
        """``rows.of`` by samples, also where these are packed and rows are told by token."""
        if self.packing is None or rows.per != self.tokens:
            return rows.samples
        return self.packing.sample_of(rows.of.contiguous())

    def __getitem__(self, x: Tensor) -> Followed | None:
        return None if self.lost(x) else self._tags.get(x)

    def __contains__(self, x: Tensor) -> bool:
        """Whether it is known where the batch is in ``x``, or that it is lost."""
        return self._tags.get(x) is not None or self.lost(x)

    def lost(self, x: Tensor) -> bool:
        """Whether samples are in ``x`` that cannot be told apart, where scores would follow its graph.

        While gradients are off, as when a reentrant checkpoint first runs, the graph may come later.
        """
        if not x.requires_grad and torch.is_grad_enabled():
            return False
        tag = self._tags.get(x, _UNKNOWN)
        base = x._base
        if tag is None or (base is not None and self._tags.get(base, _UNKNOWN) is None):
            return True
        return tag is not _UNKNOWN and is_opaque(x.grad_fn)

    def seen_through(self, view: Tensor, base: Tensor) -> Followed | None:
        """Where the samples that ``view`` has in blocks are in ``base``, of which it is a view; None where they are elsewhere."""
        tag = self[view]
        if not isinstance(tag, Blocks):
            return None
        axis = tag.axis
        step, size = view.stride(axis), view.shape[axis]
        others = [(view.stride(d), view.shape[d]) for d in range(view.ndim) if d != axis and view.shape[d] > 1]
        offset = view.storage_offset() - base.storage_offset()
        within = offset % max(step, 1) + sum(stride * (count - 1) for stride, count in others if stride < step)
        beyond = [stride for stride, _ in others if stride >= step]
        counting = {(view.stride(d), view.shape[d]) for d in tag.tokens}
        for d in range(base.ndim):
            if base.stride(d) != step or base.shape[d] != size or size == 1 or not base.is_contiguous():
                continue
            if within < step and offset // step % size == 0 and all(stride % (step * size) == 0 for stride in beyond):
                return Blocks(d, tag.rows, frozenset(d for d in range(base.ndim) if (base.stride(d), base.shape[d]) in counting))
        return None

    def fits(self, x: Tensor, tag: Followed) -> bool:
        if isinstance(tag, Rows):
            return tag.of.ndim == x.ndim and all(s in (1, size) for s, size in zip(tag.of.shape, x.shape, strict=True))
        return tag.axis < x.ndim and x.shape[tag.axis] == self.n * tag.rows

    def argument(self, x: Tensor) -> Blocks:
        """The tag of an argument of the model, ``[n, ...]``, or ``[n, tokens, ...]`` of packed rows."""
        return Blocks(0, 1, frozenset({1}) if self.tokens > 1 and x.ndim > 1 and x.shape[1] == self.tokens else frozenset())

    def told(self, x: Tensor, tag: Followed) -> Tag | None:
        """What a call tells of its output ``x``; None where the tokens of packed rows cannot be told."""
        if isinstance(tag, Rows):
            return tag if self.packing is None or tag.per == self.tokens else None
        if self.packing is None:
            return tag.axis, tag.rows
        usual = {tag.axis} if tag.rows > 1 else {0 if tag.axis else 1}
        if tag.tokens == usual and (tag.rows > 1 or x.ndim > 2):
            return tag.axis, tag.rows
        return self.as_rows(x, tag) if tag.tokens or self.tokens <= 1 else None

    def in_line(self, x: Tensor, tag: Followed) -> bool:
        """Whether the rows of ``x [..., d]``, as they lie in a line, are the samples' in order; of packed rows, the tokens."""
        if not isinstance(tag, Blocks) or tag.axis != 0:
            return False
        if self.packing is None or x[..., 0].numel() == self.n == self.packing.tokens:
            return True
        return tag.tokens == ({0} if tag.rows > 1 else {1}) and x[..., 0].numel() == self.packing.tokens

    def tag(self, x: Tensor, tag: Followed | None) -> None:
        """Tags ``x`` if the tag fits its shape. Without one ``x`` is lost, unless it is a constant for good."""
        if tag is not None and self.fits(x, tag):
            self._tags[x] = tag
        elif x.requires_grad or not torch.is_grad_enabled():
            self._tags[x] = None
            self.moved = True
        else:
            self._tags.pop(x, None)
        if x.grad_fn is not None:
            self.nodes.add(x.grad_fn)

    def made_by(self, node: Any, output: int) -> Tensor | None:
        """The tagged tensor that is this output of a node of the graph."""
        for x in self._tags:
            if x.grad_fn is node and x.output_nr == output:
                return x
        return None

    def reached_from(self, x: Tensor) -> tuple[bool, list[Tensor]]:
        """Whether samples passed anywhere in the graph of ``x``, and the leaves of the graph that were visited."""
        found, leaves, visited = [x.grad_fn], [], set()
        while found:
            node = found.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            if node in self.nodes or (leaf is not None and leaf in self):
                return True, leaves
            found += [parent for parent, _ in node.next_functions]
        return False, leaves

    def hidden_on_the_way_to(self, x: Tensor) -> bool:
        """Whether samples may have passed a custom function whose doings are unknown, after they were last seen."""
        found, visited = [x.grad_fn], set()
        while found:
            node = found.pop()
            if node is None or node in visited or node in self.nodes:
                continue
            visited.add(node)
            if is_opaque(node):
                return True
            found += [parent for parent, _ in node.next_functions]
        return False

    def infer(
        self, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor, index: int = 0
    ) -> Followed | None:
        """The tag of ``out``, the ``index``-th result of ``func(*args, **kwargs)``, of which ``tensors`` are all arguments that
        may carry samples."""
        if any(self.lost(t) for t in tensors):
            return None
        known, kwargs = counterpart(func), {k: x for k, x in kwargs.items() if k != "out"}
        understood = known is not func or func in DECLARED or attention.names_of(func) is not None
        if understood and (function := custom_function(out.grad_fn)) is not None:
            FOLLOWED.add(function)
        func = known
        name = next((name for name in _FIRST if name in kwargs), None)
        if not args and name is not None and func not in rules.PRODUCTS:
            args, kwargs = (kwargs[name],), {k: v for k, v in kwargs.items() if k != name}
        call = Landing(self, func, args, kwargs, tensors, out, index)
        tagged, self._constant = self.tagged(tensors), torch.is_grad_enabled() and not out.requires_grad
        try:
            tag = self._in_blocks(call, tagged)
            if tag is None or self._moves_tokens(call, tagged):
                rows = self._by_index(call, tagged)
                self.moved |= rows is not None
                return tag if rows is None else rows
            return tag
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):  # called in a way that no rule foresees
            return None

    def tagged(self, tensors: list[Tensor]) -> list[tuple[Tensor, Followed]]:
        """Those whose tags count: a constant may have been taken for a batch by its size, a tensor with a graph was not."""
        tagged = [(t, tag) for t in tensors if (tag := self[t])]
        return [(t, tag) for t, tag in tagged if t.requires_grad] or tagged

    def _moves_tokens(self, call: "Landing", tagged: list[tuple[Tensor, Followed]]) -> bool:
        """Whether tokens of packed rows are taken, moved or joined, after which only an index tells whose they are."""
        moves = call.func in MOVES or call.func in JOINS or call.func in WRITES
        return moves and any(isinstance(tag, Blocks) and len(call.tokens(x, tag)) < len(tag.tokens) for x, tag in tagged)

    def _in_blocks(self, call: "Landing", tagged: list[tuple[Tensor, Followed]]) -> Blocks | None:
        """The result's tag where all arguments have their samples in blocks of rows, in order, and it has them so too."""
        found: set[tuple[int, int] | None] = set()
        tokens: set[int] = set()
        for x, tag in tagged:
            if isinstance(tag, Rows):
                return None
            try:
                found.add(call.block(x, tag))
                tokens |= call.tokens(x, tag)
            except (TypeError, ValueError, IndexError, RuntimeError, AttributeError):
                return None
        landed = found.pop() if len(found) == 1 else None
        if landed is None:
            return None
        tag = Blocks(*landed, self._counting(call.out, landed, tokens))
        return tag if self.fits(call.out, tag) else None

    def _counting(self, out: Tensor, landed: tuple[int, int], dims: set[int]) -> frozenset[int]:
        """Those of ``dims`` that have as many elements, or rows to a block, as there are tokens."""
        return frozenset(d for d in dims if (landed[1] if d == landed[0] else out.shape[d]) == self.tokens)

    def _by_index(self, call: "Landing", tagged: list[tuple[Tensor, Followed]]) -> Followed | None:
        """The result's tag by the rows' index, which each argument's tag can be told by."""
        out = call.out
        if out.ndim == 0:
            return None
        found: list[Rows] = []
        for x, tag in tagged:
            rows = self.as_rows(x, tag)
            same = call.keeps(x) and len(tagged) == 1 and out.ndim == x.ndim
            of = rows.of if same else call.index(x, rows)
            if of is None:
                return None
            if same and isinstance(tag, Rows) and self.fits(out, tag):
                return tag
            found.append(Rows(of, rows.per))
        merged: Rows | None = found[0] if found else None
        for rows in found[1:]:
            merged = None if merged is None else self._merged(merged, rows)
        return None if merged is None else self._simplest(merged, out, call.func in rules.RESHAPES)

    def through(
        self,
        tags: Mapping[int, Followed],
        tensors: Sequence[Tensor],
        out: Tensor,
        land: Callable[[dict[int, int]], int | None],
        land_token: Callable[[int, int], int | None],
    ) -> Followed | None:
        """The tag of ``out``, which a layer made of ``tensors`` with ``tags``; ``land`` tells where the axes of some lie in it.

        ``land_token(i, d)``: where tokens along dimension ``d`` of the ``i``-th do.
        """
        blocks = {i: tag for i, tag in tags.items() if isinstance(tag, Blocks)}
        self._constant = False
        if len(blocks) == len(tags):
            rows = {tag.rows for tag in blocks.values()}
            axis = land({i: tag.axis for i, tag in blocks.items()}) if len(rows) == 1 else None
            if axis is None:
                return None
            landed = axis, rows.pop()
            places = {axis if d == tag.axis else land_token(i, d) for i, tag in blocks.items() for d in tag.tokens}
            return Blocks(*landed, self._counting(out, landed, {d for d in places if d is not None}))
        if len(tags) > 1:
            return None
        ((i, tag),) = tags.items()
        of = self.landed(self.as_rows(tensors[i], tag), out, lambda d: land({i: d}))
        return None if of is None else self._simplest(of, out, False)

    def landed(self, rows: Rows, out: Tensor, land: Callable[[int], int | None]) -> Rows | None:
        """The rows in ``out``, where ``land`` tells where a dimension lies in it, None if what lies along it is mixed."""
        places: dict[int, int] = {}
        for d in rows.varies():
            place = land(d)
            if place is not None:
                places[d] = place
                continue
            together = self.together(rows, d)
            if together is None:
                return None
            rows = together
        if len(set(places.values())) < len(places):
            return None
        order = sorted(places, key=places.__getitem__)
        shape = [1] * out.ndim
        for d in order:
            shape[places[d]] = rows.of.shape[d]
        of = rows.of.permute([*order, *(d for d in range(rows.of.ndim) if d not in places)])
        return Rows(of.reshape(shape), rows.per)

    def as_rows(self, x: Tensor, tag: Followed) -> Rows:
        """The tag of ``x`` told by an index."""
        if isinstance(tag, Rows):
            return tag
        axis, per, tokens = tag
        place = _counted(x, axis)
        if self.packing is None or axis in tokens:
            return Rows(place, per)
        row = place.div(per, rounding_mode="floor")  # of the batch
        if not tokens:
            return Rows(row, 1)
        # of a pair of tokens, which are of one sample, the first
        return Rows(row * self.tokens + _counted(x, min(tokens)), self.tokens)

    def certain(self, holds: Tensor) -> bool:
        """Whether ``holds``; where looking would wait for a device, it is taken for granted, and doubted until the scores come.

        Not of what carries no gradient: that may be held for a constant, which it is to the scores.
        """
        if holds.device.type == "cpu" and self.look:
            return bool(holds)
        if self._constant:
            return False
        self.doubts.append(~holds)
        return True

    def together(self, rows: Rows, d: int) -> Rows | None:
        """``rows`` with what lies along dimension ``d`` taken together; None where it is of several samples."""
        if rows.of.shape[d] == 0:
            return Rows(rows.of.new_full([1 if k == d else s for k, s in enumerate(rows.of.shape)], NOBODY), rows.per)
        of = rows.of.amax(d, keepdim=True)
        same = (self.owners(rows) == self.owners(Rows(of, rows.per))) | (rows.of == NOBODY)
        return Rows(of, rows.per) if self.alone or self.certain(same.all()) else None

    def _merged(self, a: Rows, b: Rows) -> Rows | None:
        """Of a tensor that has something of the rows of both; None where these are of different samples."""
        if self.packing is not None and a.per != b.per:
            return None  # the number of a row tells nothing of its tokens
        nobody = (a.of == NOBODY) | (b.of == NOBODY)
        if not self.alone and not self.certain(((self.owners(a) == self.owners(b)) | nobody).all()):
            return None
        if a.per == b.per:
            return Rows(torch.maximum(a.of, b.of), a.per)
        fine, coarse = (a, b) if a.per < b.per else (b, a)
        # another number of rows to a sample: of those that the finer one leaves open, the first
        return Rows(torch.where(fine.of == NOBODY, coarse.samples * fine.per, fine.of), fine.per)

    def _simplest(self, rows: Rows, out: Tensor, reshaped: bool) -> Followed | None:
        """The tag in its simplest form: in blocks, if they are."""
        if any(s not in (1, size) for s, size in zip(rows.of.shape, out.shape, strict=True)):
            return None
        if self.packing is not None and rows.per == self.tokens:
            return rows
        look, dims = self.look and out.device.type == "cpu", rows.varies()
        # rows of tokens that are split into samples and tokens again: what was padding is each sample's own
        again = reshaped and len(dims) > 1
        if not look:
            dims = dims[: again and rows.of.numel() == self.n * rows.per]
        for d in dims:
            size = rows.of.shape[d]
            if size == 0 or size % self.n or (not look and size != self.n):
                continue
            blocks = torch.arange(self.n, device=out.device).repeat_interleave(size // self.n, output_size=size)
            same = rows.samples == blocks.view([size if k == d else 1 for k in range(out.ndim)])
            if self.certain((same | (rows.of == NOBODY) if again else same).all()):
                return Blocks(d, size // self.n)
        return rows


class Landing:
    """One call of a torch function: where the rows of its arguments come to lie in one of its results."""

    def __init__(self, batch: Batch, func: Callable, args: tuple, kwargs: dict, tensors: list[Tensor], out: Tensor, index: int):
        self.batch, self.func, self.args, self.kwargs = batch, func, args, kwargs
        self.tensors, self.out, self.result = tensors, out, index

    def keeps(self, x: Tensor) -> bool:
        """Whether the function works element by element on a tensor of the result's shape."""
        return (self.func in POINTWISE or self.func in DECLARED) and x.shape == self.out.shape

    # samples in blocks along one dimension

    def block(self, x: Tensor, tag: Blocks) -> tuple[int, int] | None:
        """Where the blocks of ``x`` are in the result."""
        axis, rows, _ = tag
        if self.func in DECLARED:
            return axis, rows
        if self.func is Tensor.__setitem__:
            return self._written(*self.args)
        if self.func in rules.RESHAPES and x is self.args[0]:
            return self._reshaped(x, axis)
        place = self.place(x, axis)
        return None if place is None else (place, rows)

    def tokens(self, x: Tensor, tag: Blocks) -> set[int]:
        """Along which dimensions of the result the tokens of packed rows lie that ``x`` has."""
        if not tag.tokens:
            return set()
        names = attention.names_of(self.func)
        if names is not None:  # a result is its query's
            query = rules.bind(names, self.args, self.kwargs)[0][0] is x and self.result == 0
            return {d + self.out.ndim - x.ndim for d in tag.tokens} if query else set()
        if self.func in rules.RESHAPES:
            return self._reshaped_tokens(x, tag) if x is self.args[0] else set()
        if self.func is Tensor.__setitem__:
            return self._written_tokens(x, tag)
        landed = self.block(x, tag)
        places = {None if landed is None else landed[0] if d == tag.axis else self.place(x, d) for d in tag.tokens}
        return {d for d in places if d is not None}

    def _reshaped_tokens(self, x: Tensor, tag: Blocks) -> set[int]:
        """The dimensions of as many elements, with as many behind each: row-major, they count the same."""
        out, size = self.out.shape, self.batch.tokens
        found: set[int] = set()
        for d in tag.tokens:
            behind = prod(x.shape[d + 1 :])
            found |= {e for e in range(len(out)) if e != tag.axis and out[e] == size and prod(out[e + 1 :]) == behind}
            row = size * behind if d == tag.axis else tag.rows * prod(x.shape[tag.axis + 1 :])  # elements to a row of the batch
            if row == size * behind and prod(out[tag.axis + 1 :]) == behind:
                found.add(tag.axis)
        return found

    def _written_tokens(self, x: Tensor, tag: Blocks) -> set[int]:
        target, index, value = self.args
        if x is target:
            return set(tag.tokens)
        first = torch.empty(target.shape, device="meta")[index].ndim - value.ndim
        wanted = {d + first for d in tag.tokens}
        return {d for d in range(target.ndim) if rules.getitem(target, d, target, index) in wanted}

    def _reshaped(self, x: Tensor, axis: int) -> tuple[int, int] | None:
        """Row-major reshapes keep a sample's elements together as long as the dimensions before the batch stay."""
        out, n = self.out, max(self.batch.n, 1)  # of an empty batch everything is a multiple
        if out.numel() != x.numel() or out.shape[:axis] != x.shape[:axis] or out.ndim <= axis or out.shape[axis] % n:
            return None
        return axis, out.shape[axis] // n

    def _written(self, target: Tensor, index: Any, value: Any) -> tuple[int, int] | None:
        """The one dimension of ``target`` that its part at ``index`` shows where ``value`` has its samples."""
        own, tag = self.batch[target], self.batch[value] if isinstance(value, Tensor) else None
        if isinstance(tag, Rows) or isinstance(own, Rows):
            return None
        if tag is None:
            return None if own is None else own[:2]
        axis, rows, _ = tag
        axis += torch.empty(target.shape, device="meta")[index].ndim - value.ndim
        places = range(target.ndim) if own is None else [own[0]]
        size = self.batch.n * rows
        found = [a for a in places if target.shape[a] == size and rules.getitem(target, a, target, index) == axis]
        return (found[0], rows) if len(found) == 1 else None

    def place(self, x: Tensor, axis: int) -> int | None:
        """Where what lies along dimension ``axis`` of the argument ``x`` lies in the result; None if it is mixed, or unknown."""
        func, args, kwargs, out = self.func, self.args, self.kwargs, self.out
        if func in POINTWISE or (func in POINTWISE_IF_TWO and len(self.tensors) == 2):
            # broadcasting aligns dimensions from the right; a loss that was reduced has another shape
            elementwise = torch.broadcast_shapes(*(t.shape for t in self.tensors)) == out.shape
            return axis + out.ndim - x.ndim if elementwise else None
        if func in DECLARED:
            return axis
        if func in rules.PRODUCTS:
            rule, names, carriers = rules.PRODUCTS[func]
            bound, kwargs = rules.bind(names, args, kwargs)
            return _the_one({rule(i, axis, out, *bound, **kwargs) for i in carriers if i < len(bound) and _holds(bound[i], x)})
        if func in rules.EINSUM:
            operands = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
            return _the_one({rules.einsum(args[0], operands, i, axis, out) for i, t in enumerate(operands) if t is x})
        if func in rules.LISTS:
            return _the_one({rules.LISTS[func](args[0], axis, out, *args[1:], **kwargs)})
        if x is not args[0]:
            table = func is Tensor.__getitem__ and x is args[1] and x.dtype not in (torch.bool, torch.uint8)
            return axis if table and args[0] not in self.batch else None  # rows of a table, one per element of the index
        return _the_one({rules.RULES[func](x, axis, out, *args[1:], **kwargs)}) if func in rules.RULES else None

    # rows by an index

    def index(self, x: Tensor, rows: Rows) -> Tensor | None:
        """The index of the result, as far as the argument ``x`` is concerned; None where rows of different samples meet."""
        func, args, kwargs, out = self.func, self.args, self.kwargs, self.out
        names = attention.names_of(func)
        if names is not None:
            return self._attended(names, x, rows)
        if func in WRITES:
            return self._after_writing(x, rows)
        if func in JOINS:
            return shrunk(JOINS[func](func, rows.of, x, *args, **kwargs))
        if func in MOVES:
            bound, rest = rules.bind(rules.PRODUCTS[func].names, args, kwargs) if func in rules.PRODUCTS else (args, kwargs)
            if x is bound[0]:
                moved = MOVES[func](func, rows.of, x, *bound[1:], **rest)
                if isinstance(moved, (tuple, list)):
                    moved = moved[self.result]
                return None if moved is None else shrunk(moved)
        landed = self.batch.landed(rows, out, lambda d: self.place(x, d))
        return None if landed is None else landed.of

    def _attended(self, names: tuple[str, ...], x: Tensor, rows: Rows) -> Tensor | None:
        """The queries' index, where none of them sees a key or a value ``x`` of another sample."""
        bound, _ = rules.bind(names, self.args, self.kwargs)
        tag = self.batch[bound[0]]
        if self.result or tag is None or not any(x is y for y in bound[:3]):
            return None
        queries = self.batch.as_rows(bound[0], tag)
        if queries.of.shape[-1] != 1 or rows.of.shape[-1] != 1:
            return None
        apart = self.batch.alone or attention.sees_its_own(names, bound, self.batch.owners(queries), self.batch.owners(rows))
        return queries.of if apart is True or self.batch.certain(apart) else None

    def _after_writing(self, x: Tensor, rows: Rows) -> Tensor | None:
        write = WRITES[self.func]
        bound, rest = rules.bind(write.names, self.args, self.kwargs)
        if "reduce" in rest:
            write = write._replace(adds=True)
        place, found = bound[1 : len(write.names) - 1], []
        if x is bound[0]:
            found.append(write.target(rows.of, self.out, place))
        if len(bound) >= len(write.names) and x is bound[len(write.names) - 1]:
            placed, of, there = write.source(rows.of, x, self.out, place)
            if not self.batch.alone:
                same = self.batch.owners(Rows(of, rows.per)) == self.batch.owners(Rows(there, rows.per))
                if not self.batch.certain((same | (of == NOBODY)).all()):
                    return None  # rows of several samples came to one place
            found.append(placed)
        if len(bound) > len(write.names) and bound[len(write.names)] is True:  # index_put(accumulate=True)
            return None
        return shrunk(reduce(torch.maximum, found)) if found else None


def _counted(x: Tensor, d: int) -> Tensor:
    """0, 1, ... along dimension ``d`` of ``x``, to broadcast to it."""
    return torch.arange(x.shape[d], device=x.device).view([x.shape[d] if k == d else 1 for k in range(x.ndim)])


def _holds(argument: Any, x: Tensor) -> bool:
    return argument is x or (isinstance(argument, (list, tuple)) and any(y is x for y in argument))


def _the_one(places: set[int | None]) -> int | None:
    return places.pop() if len(places) == 1 else None
