"""Heads that no module call shows: a weight used through functions, on any rows, in the model or in its loss."""

import sys
import types

import pytest
import torch
from oracles import close, gradients, inner
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import adam_ghost as ag

N, T, D, V = 4, 7, 6, 11


class LM(nn.Module):
    """Token embeddings, a layer, and a head that is tied to them, or not; ``loss`` is what it does with its hidden rows."""

    def __init__(self, loss, tied: bool):
        super().__init__()
        self.tokens, self.mix, self.norm = nn.Embedding(V, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.head, self.loss = nn.Linear(D, V, bias=not tied), loss
        if tied:
            self.head.weight = self.tokens.weight

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.norm(x + torch.tanh(self.mix(x.cumsum(1))))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self, self.hidden(ids)[:, :-1], labels[:, 1:])


def total(model: LM, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss by its definition: the head's module, all at once."""
    return F.cross_entropy(model.head(hidden).flatten(0, 1), labels.flatten(), reduction="sum")


def valid(hidden, labels):
    """The rows that have a label, in another order."""
    mask = labels != -100
    rows, labels = hidden[mask], labels[mask]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    return rows[order], labels[order]


def chunked(logits, checkpointed=False):
    """As trainers do it: rows with a label, a chunk after the other, each chunk's logits gone before the next one's."""

    def chunk(x, y, weight, bias):
        return F.cross_entropy(logits(x, weight, bias), y, reduction="sum")

    def loss(model, hidden, labels):
        found = hidden.new_zeros(())
        for x, y in zip(*(t.split(5) for t in valid(hidden, labels)), strict=True):
            args = (x, y, model.head.weight, model.head.bias)
            found = found + (checkpoint(chunk, *args, use_reentrant=False) if checkpointed else chunk(*args))
        return found

    return loss


def added(x, bias):
    return x if bias is None else x + bias


def fused(model, hidden, labels):
    rows, labels = valid(hidden, labels)
    return F.linear_cross_entropy(rows, model.head.weight, labels, linear_bias=model.head.bias, reduction="sum")


def fused_mean(model, hidden, labels):
    labels = labels.flatten()
    loss = F.linear_cross_entropy(hidden.flatten(0, 1), model.head.weight, labels, linear_bias=model.head.bias)
    return loss * (labels != -100).sum()


def baddbmm(x, w, b):
    start = torch.zeros(1, 1, 1).double() if b is None else b.view(1, 1, -1)
    return torch.baddbmm(input=start, batch1=x[None], batch2=w.T[None])[0]


LOSSES = {
    "linear": chunked(F.linear),
    "linear-checkpointed": chunked(F.linear, checkpointed=True),
    "matmul": chunked(lambda x, w, b: added(x @ w.T, b)),
    "matmul-left": chunked(lambda x, w, b: added((w @ x.T).T, b)),
    "einsum": chunked(lambda x, w, b: added(torch.einsum("nd,vd->nv", x, w), b)),
    "addmm": chunked(lambda x, w, b: x @ w.mT if b is None else torch.addmm(b, x, w.mT)),
    "baddbmm": chunked(baddbmm),
    "transposed-rows": chunked(lambda x, w, b: added(torch.mm(x, w.t().contiguous()), b)),
    "scaled-weight": chunked(lambda x, w, b: added(F.linear(x, w * 2) / 2, b)),
    "linear-cross-entropy": fused,
    "linear-cross-entropy-mean": fused_mean,
}


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (N, T), generator=g)
    return ids, torch.where(torch.rand(N, T, generator=g) < 0.4, -100, ids)


def direction(model):
    g = torch.Generator().manual_seed(5)
    return {k: torch.randn(p.shape, generator=g, dtype=p.dtype) for k, p in model.named_parameters()}


def one_by_one(model, P, ids, labels):
    """By batches of one, and the loss' definition."""
    params, plain = dict(model.named_parameters()), LM(total, False)
    return torch.stack(
        [
            inner(P, gradients(plain.loss(model, model.hidden(ids[i : i + 1])[:, :-1], labels[i : i + 1, 1:]), params))
            for i in range(N)
        ]
    )


def model_of(loss, tied):
    torch.manual_seed(3)
    return LM(loss, tied).double()


def scores(model, P, run):
    """Of one pass inside of a cache, every parameter covered."""
    from adam_ghost.layer_cache import open_step

    cache = ag.LayerCache(model, strict=True)
    with cache:
        run()
    step = open_step(cache, torch.optim.Adam(model.parameters()))
    assert step.missing == []
    found = step.scores({k: x[None] for k, x in P.items()}).squeeze(-1)
    params = dict(model.named_parameters())
    close(found.sum(), inner(P, {k: p.grad for k, p in params.items()}))
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("where", ["in-the-model", "in-the-loss"])
def test_weights_used_by_functions(name, tied, where):
    ids, labels = batch(1)
    model = model_of(LOSSES[name], tied)
    P = direction(model)

    def run():
        if where == "in-the-model":
            model(ids, labels).backward()
        else:
            holder.loss(model, holder(ids)[:, :-1], labels[:, 1:]).backward()

    if where == "in-the-loss":
        holder, model.loss = model, LOSSES[name]
        model.forward = types.MethodType(LM.hidden, model)
    close(scores(model, P, run), one_by_one(model, P, ids, labels))


class ChunkedLogProbFunction(torch.autograd.Function):
    """Like TRL's: log-probabilities of targets, whose backward forms the logits again, tile by tile."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=()):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.how = temperature, softcap, scale
        log_p = ChunkedLogProbFunction.log_p(ctx.how, hidden, weight, bias, targets)
        return log_p, log_p * 2 if "entropy" in outputs else None  # which nobody uses

    @staticmethod
    def log_p(how, hidden, weight, bias, targets):
        temperature, softcap, scale = how
        logits = F.linear(hidden, weight, bias) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, grad, _):
        tensors = [x.detach().requires_grad_(x.is_floating_point()) if x is not None else None for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ChunkedLogProbFunction.log_p(ctx.how, *tensors)
        wanted = [x for x in tensors if x is not None and x.requires_grad]
        found = dict(zip(map(id, wanted), torch.autograd.grad(out, wanted, grad), strict=True))
        return *(found.get(id(x)) for x in tensors[:3]), *(None,) * 6


class LigerFusedLinearCrossEntropyFunction(torch.autograd.Function):
    """Like Liger's: the loss, whose gradients are formed with it."""

    @staticmethod
    def forward(ctx, _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, *rest):
        with torch.enable_grad():
            x, w, b = (t if t is None else t.detach().requires_grad_() for t in (_input, weight, bias))
            logits = F.linear(x, w, b)
            keep = target != ignore_index
            loss = F.cross_entropy(logits, target, ignore_index=ignore_index)
            loss = loss + lse_square_scale * (logits.logsumexp(-1).square() * keep).sum() / keep.sum()
            wanted = [t for t in (x, w, b) if t is not None]
            grads = torch.autograd.grad(loss, wanted)
        ctx.save_for_backward(*grads)
        return loss.detach(), None, None, None

    @staticmethod
    def backward(ctx, grad, *_):
        x, w, *b = (g * grad for g in ctx.saved_tensors)
        return x, w, None, b[0] if b else None, *(None,) * 14


def stands_for(monkeypatch, function, module):
    """Has our function found in the place of a library's."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function.__name__: function}))


def by_trl(model, hidden, labels):
    mask = labels != -100
    found = ChunkedLogProbFunction.apply(
        hidden[mask], model.head.weight, model.head.bias, labels[mask], 1.0, 32, None, 1.0, ("entropy",)
    )[0]
    return -hidden.new_zeros(mask.shape).masked_scatter(mask, found).sum()


def by_liger(model, hidden, labels):
    labels = labels.flatten()
    args = (hidden.flatten(0, 1), model.head.weight, labels, model.head.bias)
    return LigerFusedLinearCrossEntropyFunction.apply(*args)[0] * (labels != -100).sum()


FUSED = {
    "trl": (by_trl, ChunkedLogProbFunction, "trl.kernels.chunked_logprob"),
    "liger": (by_liger, LigerFusedLinearCrossEntropyFunction, "liger_kernel.ops.fused_linear_cross_entropy"),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FUSED)
def test_heads_of_libraries(name, tied, monkeypatch):
    loss, function, module = FUSED[name]
    stands_for(monkeypatch, function, module)
    ids, labels = batch(1)
    model = model_of(loss, tied)
    P = direction(model)
    close(scores(model, P, lambda: model(ids, labels).backward()), one_by_one(model, P, ids, labels))


def test_a_head_that_is_a_loss():
    """torch's module of both."""
    ids, labels = batch(1)
    model = model_of(None, False)
    criterion = nn.LinearCrossEntropyLoss(D, V, bias=True, reduction="sum").double()
    del model.head
    model.criterion = criterion
    model.loss = lambda m, hidden, labels: m.criterion(*valid(hidden, labels))
    P = direction(model)
    found = scores(model, P, lambda: model(ids, labels).backward())
    model.head = criterion.linear
    close(found, one_by_one(model, P, ids, labels))


@pytest.mark.parametrize("name", ["linear", "linear-cross-entropy"])
@pytest.mark.parametrize("way", ["midpoint", "lookahead", "window"])
def test_a_loss_outside_of_the_model_in_a_run(way, name):
    """Inside of ``with run.batch(ids)`` the weights that the loss uses are attributed; scores add up to the step."""
    ids, labels = batch(1)
    model, val = model_of(None, False), batch(2)
    model.forward = types.MethodType(LM.hidden, model)
    loss = lambda inputs: LOSSES[name](model, model(inputs[0])[:, :-1], inputs[1][:, 1:])  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(11):
        optimizer.zero_grad()
        loss((ids, labels)).backward()
        optimizer.step()
    optimizer.zero_grad()
    windows = {"window": 1, "ahead": 0, "train_loss": loss, "feedback": "none"} if way == "window" else {}
    with ag.InRun(model, optimizer, lambda: loss(val), way, strict=True, fallback=False, **windows) as run:
        with run.batch(range(N), inputs=(ids, labels)):
            found = loss((ids, labels))
        found.backward()
        optimizer.step()
        run.flush()
        record = run.steps[-1]
        assert record.coverage == 1
        close(torch.tensor(record.score_sum), torch.tensor(record.total), 1e-9)
