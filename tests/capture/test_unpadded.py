"""Attention without padding: tokens of all samples in one row, which segments, masks or positions keep apart."""

import sys
from types import ModuleType

import pytest
import torch
from models import D, N
from oracles import Problem, close, gradients_one_by_one, inner
from torch import Tensor, nn
from torch.nn import functional as F

import adam_ghost as ag
from adam_ghost.capture.batch import Batch
from adam_ghost.run.lookahead import ContractingRecording

T, HEADS = 7, 2
LENGTHS = torch.tensor([3, 7, 1, 4, 6])


def weights(q: Tensor, k: Tensor, starts: Tensor, causal: bool) -> Tensor:
    """``[heads, M, M]``: of attention within each segment."""
    seen = documents(starts)[:, None] == documents(starts)
    seen = seen.tril() if causal else seen
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return logits.masked_fill(~seen, float("-inf")).softmax(-1)


def attended(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> Tensor:
    return torch.einsum("hqk,khd->qhd", weights(q, k, starts, causal), v)


def gradients_of(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """By hand: a kernel may not use autograd."""
    w = weights(q, k, starts, causal)
    of_w = torch.einsum("qhd,khd->hqk", grad, v)
    of_logits = w * (of_w - (w * of_w).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    by_pair = "hqk,khd->qhd", "hqk,qhd->khd"
    return torch.einsum(by_pair[0], of_logits, k), torch.einsum(by_pair[1], of_logits, q), torch.einsum(by_pair[1], w, grad)


def documents(starts: Tensor) -> Tensor:
    """``[M]``: the segment of each token."""
    return torch.searchsorted(starts, torch.arange(int(starts[-1])), right=True)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """With the arguments of flash-attn's function of that name."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, scale, causal):
        ctx.save_for_backward(q, k, v, cu_seqlens_q)
        ctx.causal = causal
        return attended(q, k, v, cu_seqlens_q, causal)

    @staticmethod
    def backward(ctx, grad):
        return *gradients_of(grad, *ctx.saved_tensors, ctx.causal), *[None] * 7


class IndexFirstAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices):
        ctx.save_for_backward(indices)
        ctx.rows = len(x)
        return x[indices]

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy(0, ctx.saved_tensors[0], grad), None


class IndexPutFirstAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, indices, rows):
        ctx.save_for_backward(indices)
        return x.new_zeros(rows, *x.shape[1:]).index_copy(0, indices, x)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.saved_tensors[0]], None, None


@pytest.fixture
def flash(monkeypatch):
    """The library, as far as a machine without a GPU can have it."""
    for name, members in {
        "flash_attn.flash_attn_interface": [FlashAttnVarlenFunc],
        "flash_attn.bert_padding": [IndexFirstAxis, IndexPutFirstAxis],
    }.items():
        module = ModuleType(name)
        vars(module).update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def varlen():
    """torch's own attention within segments, with kernels for the CPU, which it has none of."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def forward(q, k, v, starts, starts_k, max_q, max_k, is_causal=False, *_, **__):
        return attended(q, k, v, starts, is_causal), q.new_empty(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad, q, k, v, out, lse, starts, starts_k, max_q, max_k, is_causal, *_, **__):
        return gradients_of(grad, q, k, v, starts, is_causal)

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)


def by_flash(q, k, v, starts):
    return FlashAttnVarlenFunc.apply(q, k, v, starts, starts, T, T, 0.0, None, True)


def by_varlen(q, k, v, starts):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, starts, starts, T, T, window_size=(-1, 0))


def by_mask(q, k, v, starts, lower=None, blind=None):
    mask = documents(starts)[:, None] == documents(starts)
    if blind is not None:
        mask[blind] = False
    if lower is not None:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, lower)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def by_least_mask(q, k, v, starts, blind=None):
    return by_mask(q, k, v, starts, torch.finfo(q.dtype).min, blind)


class Unpadded(nn.Module):
    """Padded tokens ``[n, T, D]`` lose their padding before attention, and get it back after it."""

    def __init__(self, attend, library=False):
        super().__init__()
        self.attend, self.library = attend, library
        self.inner, self.qkv, self.out = nn.Linear(D, D), nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 2)

    def starts(self, kept):
        return F.pad(kept.sum(1).cumsum(0), (1, 0)).int()

    def forward(self, x, kept):
        indices, rows = kept.flatten().nonzero().flatten(), torch.tanh(self.inner(x)).flatten(0, 1)
        tokens = IndexFirstAxis.apply(rows, indices) if self.library else rows[indices]
        q, k, v = self.qkv(tokens).view(-1, 3, HEADS, D // HEADS).unbind(1)
        tokens = self.norm(tokens + self.out(self.attend(q, k, v, self.starts(kept)).reshape(-1, D)))
        size = len(rows)
        if self.library:
            padded = IndexPutFirstAxis.apply(tokens, indices, size)
        else:
            padded = torch.zeros(size, D, dtype=x.dtype).index_copy(0, indices, tokens)
        return self.head(padded.view(x.shape)) * kept.unsqueeze(-1)


def case_of(model, **options):
    kept = torch.arange(T) < LENGTHS[:, None]
    x, v = torch.randn(2, N, T, D, dtype=torch.float64)
    return Problem(model.double(), (x, kept), (v, kept), **options)


def check(case):
    case.warm().record()
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]))
    close(case.attribute(per_token=True).sum(1), case.attribute())


@pytest.mark.parametrize("look", [True, False], ids=["looking", "not-looking"])
@pytest.mark.parametrize("attend", [by_mask, by_least_mask, by_varlen])
def test_unpadded_tokens(attend, look, varlen, monkeypatch):
    monkeypatch.setattr(Batch, "look", look)
    check(case_of(Unpadded(attend)))


def test_unpadded_tokens_of_flash_attention(flash):
    check(case_of(Unpadded(by_flash, library=True)))


def wrong(starts):
    """Segments that are not the samples': the first two run together."""
    return torch.cat([starts[:1], starts[2:]])


MIXING = {
    "mask": lambda q, k, v, starts: by_mask(q, k, v, wrong(starts)),
    "least": lambda q, k, v, starts: by_least_mask(q, k, v, wrong(starts)),
    "nothing seen": lambda q, k, v, starts: by_least_mask(q, k, v, starts, blind=0),
    "finite": lambda q, k, v, starts: by_mask(q, k, v, starts, -1e4),
    "varlen": lambda q, k, v, starts: by_varlen(q, k, v, wrong(starts)),
    "no mask": lambda q, k, v, starts: by_mask(q, k, v, starts[[0, -1]]),
    "causal": lambda *x: F.scaled_dot_product_attention(*(y.transpose(0, 1)[None] for y in x[:3]), is_causal=True)[0].transpose(
        0, 1
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_attention_across_samples_is_named(name, varlen):
    case = case_of(Unpadded(MIXING[name]), cache_options={"fallback": False})
    with case.cache:
        case.backward()
    with pytest.raises(RuntimeError, match=r"not attributed: .*out.weight.*; the scores cover"):
        case.attribute()


@pytest.mark.parametrize("way", ["midpoint", "lookahead", "window"])
def test_unpadded_tokens_in_a_run(way, varlen):
    case = case_of(Unpadded(by_varlen)).warm(11)
    case.optimizer.zero_grad()

    def loss(inputs):
        return case.shares(case.model(*inputs)).sum()

    windows = {"window": 1, "ahead": 0, "train_loss": loss, "feedback": "none"} if way == "window" else {}
    with ag.InRun(case.model, case.optimizer, case.val_loss, way, strict=True, fallback=False, **windows) as run:
        run.batch(range(N), inputs=case.inputs)
        loss(case.inputs).backward()
        case.optimizer.step()
        run.flush()
        found, record = torch.from_numpy(run.scores().total), run.steps[-1]
    assert record.coverage == 1
    close(found.sum(), torch.tensor(record.total, dtype=torch.float64).squeeze())


class Packed(nn.Module):
    """Token rows of several samples; attention within documents alone, or ``wrong`` over all; some layers hide what they do."""

    def __init__(self, wrong=False):
        super().__init__()
        self.tokens, self.qkv, self.norm, self.out = nn.Embedding(9, D), nn.Linear(D, 3 * D), nn.LayerNorm(D), nn.Linear(D, 2)
        self.scale, self.wrong = nn.Parameter(torch.ones(D)), wrong

    def forward(self, ids, of):
        x = self.tokens(ids)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        seen = torch.ones_like(of[:, :, None] == of[:, None]) if self.wrong else of[:, :, None] == of[:, None]
        weights = (q @ k.mT).masked_fill(~seen[:, None], float("-inf")).softmax(-1)
        return self.out(self.norm(x + (weights @ v).transpose(1, 2).flatten(2)) * self.scale)


OF = {
    "in-line": torch.tensor([[0, 0, 0, 1, 2, 2, 2], [3, 3, 3, 3, 4, 4, 4]]),
    "anywhere": torch.tensor([[4, 0, 0, 1, 2, 4, 0], [3, -1, 3, 0, 3, 3, -1]]),
}


class PackedProblem(Problem):
    """A sample's loss is that of its tokens, wherever they are."""

    def shares(self, out, n=None):
        return self.losses(out, self.inputs[1])

    def val_loss(self):
        return self.losses(self.model(*self.val_inputs), self.val_inputs[1]).sum()


def losses_of(out, of):
    per_token = (out - 0.3).square().sum(-1)
    return torch.stack([per_token[of == i].mean() + per_token[of == i].sum().sin() for i in range(N)])


def packed(where, wrong=False):
    torch.manual_seed(0)
    ids, val = torch.randint(9, (2, 2, 7))
    model = Packed(wrong).double()
    return PackedProblem(model, (ids, OF[where]), (val, OF["in-line"]), losses=losses_of)


def told(where):
    """What the samples are told by."""
    in_line = {"offsets": torch.tensor([0, 3, 4, 7, 11, 14])}
    return in_line if where == "in-line" else {"samples": OF[where]}


def shares_of(case, P):
    found = case.losses(case.model(*case.inputs), case.inputs[1])
    grads = [torch.autograd.grad(x, list(case.params.values()), retain_graph=True) for x in found]
    return torch.stack([inner(P, dict(zip(case.params, g, strict=True))) for g in grads]), grads


@pytest.mark.parametrize("where", OF)
def test_packed_rows_in_the_thin_layer(where):
    case = packed(where).warm(3)
    case.optimizer.zero_grad()
    with case.cache.packed(**told(where)):
        case.backward()
    P = case.direction()
    want, grads = shares_of(case, P)
    close(case.attribute(), want)
    flat = torch.stack([torch.cat([x.flatten() for x in g]) for g in grads])
    close(ag.gram(case.cache, case.optimizer, preconditioner=None), flat @ flat.T)
    assert ag.gram(case.cache, case.optimizer, preconditioner="factored").isfinite().all()
    with case.cache:  # which speaks of that block alone
        case.backward()
    assert case.cache.recorded.packing is None


def test_packed_rows_scored_as_their_gradients_form(monkeypatch):
    """Each linear layer scores the rows of a sample together, wherever they lie."""
    case, taken, plain = packed("anywhere").warm(11), [], ContractingRecording.__init__

    def take(self, P, *args, **options):
        taken.append({name: x[0].clone() for name, x in P.items()})
        plain(self, P, *args, **options)

    monkeypatch.setattr(ContractingRecording, "__init__", take)
    case.optimizer.zero_grad()
    with ag.InRun(case.model, case.optimizer, case.val_loss, "lookahead", strict=True) as run:
        run.batch(range(N), **told("anywhere"))
        case.backward()
        want = shares_of(case, taken[0])[0]
        case.optimizer.step()
        run.flush()
        close(torch.from_numpy(run.scores().total), want)


@pytest.mark.parametrize("way", ["midpoint", "lookahead", "window"])
@pytest.mark.parametrize("where", OF)
def test_packed_rows_in_a_run(where, way):
    case = packed(where).warm(11)
    case.optimizer.zero_grad()

    def loss(inputs):
        return case.losses(case.model(*inputs), inputs[1]).sum()

    windows = {"window": 1, "ahead": 0, "train_loss": loss, "feedback": "none"} if way == "window" else {"audit_every": 1}
    with ag.InRun(case.model, case.optimizer, case.val_loss, way, strict=True, **windows) as run:
        run.batch(range(N), inputs=case.inputs, **told(where))
        loss(case.inputs).backward()
        if way == "midpoint":
            want = shares_of(case, case.direction())[0]
        case.optimizer.step()
        run.flush()
        found, record = torch.from_numpy(run.scores().total), run.steps[-1]
    close(found.sum(), torch.tensor(record.total, dtype=torch.float64).squeeze())
    if way == "midpoint":
        close(found, want)
    if record.audit is not None:
        assert record.audit.alone < 1e-9 and record.audit.r > 0.99


def test_an_audit_finds_packed_rows_that_meet():
    case = packed("in-line", wrong=True).warm(11)
    case.optimizer.zero_grad()
    with ag.InRun(case.model, case.optimizer, case.val_loss, "midpoint", audit_every=1) as run:
        run.batch(range(N), told("in-line")["offsets"])
        case.backward()
        with pytest.warns(UserWarning, match="the gradients of samples computed alone differ"):
            case.optimizer.step()
            run.flush()


@pytest.mark.parametrize(
    "told,error,match",
    [
        ({"offsets": torch.tensor([0, 3]), "samples": OF["in-line"]}, ValueError, "got both"),
        ({"samples": OF["in-line"].double()}, ValueError, "samples must be integers, got torch.float64"),
        ({"offsets": torch.tensor([[0, 3]])}, ValueError, r"offsets must be \[n \+ 1\] integers for n samples, got \[1, 2\]"),
        ({"offsets": [0, 3]}, TypeError, "offsets must be a tensor of integers, got list"),
        ({"offsets": torch.tensor([0, 5, 3])}, ValueError, "offsets must rise from 0 to the number of tokens .*, got 0, 5, 3"),
        ({"offsets": torch.tensor([-1, 3])}, ValueError, "offsets must rise from 0 to the number of tokens .*, got -1, 3"),
        ({}, ValueError, "packed needs offsets or samples"),
        ({"samples": OF["in-line"] - 2}, ValueError, "samples must be -1 to 2, got -2 to 2"),
    ],
)
def test_packing_that_says_nothing(told, error, match):
    with pytest.raises(error, match=match):
        packed("in-line").cache.packed(**told)
