"""What mixes the samples of a batch, or hides them, is refused or named: never scored wrongly in silence."""

import copy
import warnings

import pytest
import torch
from models import VOCABULARY, D, Fn, Leaf, N, inputs, normal, problem
from oracles import Problem, close, gradients_loss_by_loss, gradients_one_by_one, inner
from torch import nn
from torch.nn import functional as F

import adam_ghost as ag


def between(mix, **members):
    """A linear layer, then ``mix``, then another whose samples are no longer those of the batch."""
    return Fn(lambda s, x: s.b(mix(s, s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2), **members)


MIXERS = {
    "cumsum": lambda: between(lambda s, x: x.cumsum(0)),
    "softmax": lambda: between(lambda s, x: x.softmax(0)),
    "sort": lambda: between(lambda s, x: x.sort(0)[0]),
    "fft": lambda: between(lambda s, x: torch.fft.fftn(x).real),
    "mean-off": lambda: between(lambda s, x: x - x.mean(0)),
    "mean-off-keepdim": lambda: between(lambda s, x: x - x.mean(dim=(0, 1), keepdim=True)),
    "batch-norm-function": lambda: between(lambda s, x: F.batch_norm(x.mT, None, None, training=True).mT),
    "pairwise-products": lambda: between(lambda s, x: (x[:, 0] @ x[:, 0].T) @ x[:, 0]),
    "pairwise-einsum": lambda: between(lambda s, x: torch.einsum("nd,md->nm", x[:, 0], x[:, 0])[..., None] * x[:, :1]),
    "pairwise-differences": lambda: between(lambda s, x: x[:, None, 0] - x[None, :, 0]),
    "pairwise-distances": lambda: between(lambda s, x: torch.cdist(x[:, 0], x[:, 0])[:, :1] * x[:, 0]),
    "weights-over-batch": lambda: between(lambda s, x: torch.einsum("nm,mtd->ntd", s.w, x), w=normal(N, N)),
    "matmul-over-batch": lambda: between(lambda s, x: s.w @ x[:, 0], w=normal(N, N)),
    "linear-over-batch": lambda: Fn(lambda s, x: s.b(s.a(x[:, 0]).T).T, a=nn.Linear(D, D), b=nn.Linear(N, N)),
    "attention-of-samples": lambda: between(lambda s, x: s.m(*[x[:, 0]] * 3)[0], m=nn.MultiheadAttention(D, 2, batch_first=True)),
    "attention-function": lambda: between(lambda s, x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1)),
    "lstm-of-samples": lambda: between(lambda s, x: s.m(x[:, 0])[0], m=nn.LSTM(D, D, batch_first=True)),
    "convolution-of-samples": lambda: between(lambda s, x: s.m(x[:, 0]), m=nn.Conv1d(N, N, 1)),
    "layernorm-of-samples": lambda: between(lambda s, x: s.m(x.transpose(0, 1)).transpose(0, 1), m=nn.LayerNorm((N, D))),
    "unsqueezed-in-place": lambda: between(lambda s, x: (x[:, 0] * 1).unsqueeze_(0)[0].t_().T * s.w, w=normal(D)),
    "written-through-a-view": lambda: Fn(
        lambda s, x: written(s, s.a(x)), a=nn.Linear(D, D), b=nn.Linear(D, 2), start=normal(N, 1, D)
    ),
    "old-weight-norm": lambda: between(lambda s, x: s.m(x), m=old_weight_norm()),
    "unseen-time-major": lambda: Fn(
        lambda s, x: s.b(Foreign.apply(s.a(x).transpose(0, 1))).transpose(0, 1), a=nn.Linear(D, D), b=nn.Linear(D, 2)
    ),
    "custom-layer": lambda: between(lambda s, x: s.m(x), m=Leaf(lambda s, x: (x - x.mean(0)) * s.g, g=normal(D))),
}


# one expression each, of h [n, T, D] between two linear layers
EXPRESSIONS = {
    "msort": lambda h: torch.msort(h),
    "ifftn": lambda h: torch.fft.ifftn(h).real,
    "ifft2": lambda h: torch.fft.ifft2(h, dim=(0, 1)).real,
    "fftshift": lambda h: torch.fft.fftshift(h),
    "special-softmax": lambda h: torch.special.softmax(h, 0),
    "special-log-softmax": lambda h: torch.special.log_softmax(h, dim=0),
    "layer-norm": lambda h: F.layer_norm(h.movedim(0, -1), (len(h),)).movedim(-1, 0),
    "rms-norm": lambda h: F.rms_norm(h.movedim(0, -1), (len(h),)).movedim(-1, 0),
    "gumbel-softmax": lambda h: F.gumbel_softmax(h, dim=0),
    "qr": lambda h: torch.linalg.qr(h[:, 0])[0] @ h.new_ones(N, D),
    "multi-dot": lambda h: torch.linalg.multi_dot([h[:, 0], h[:, 0].T, h[:, 0]]),
    "instance-norm": lambda h: F.instance_norm(h.movedim(0, -1)).movedim(-1, 0),
    "group-norm": lambda h: F.group_norm(h.transpose(0, 1), 1).transpose(0, 1),
    "avg-pool": lambda h: F.avg_pool1d(h.movedim(0, -1), 3, 1, 1).movedim(-1, 0),
    "max-pool": lambda h: F.max_pool1d(h.movedim(0, -1), 3, 1, 1).movedim(-1, 0),
    "adaptive-pool": lambda h: F.adaptive_avg_pool1d(h.movedim(0, -1), len(h)).movedim(-1, 0),
    "response-norm": lambda h: F.local_response_norm(h.transpose(0, 1), 3).transpose(0, 1),
    "pad-circular": lambda h: F.pad(h.movedim(0, -1), (1, 1), mode="circular")[..., 1:-1].movedim(-1, 0),
    "logcumsumexp": lambda h: h.logcumsumexp(0),
    "cummax": lambda h: h.cummax(0)[0],
    "cumprod": lambda h: h.cumprod(0),
    "median-off": lambda h: h - h.median(0)[0],
    "quantiles": lambda h: torch.quantile(h[:, 0], torch.linspace(0.1, 0.9, len(h)).double(), 1)[:, :1] * h[:, 0],
    "std-over": lambda h: h / h.std(0),
    "norm-over": lambda h: h / torch.linalg.vector_norm(h, dim=0),
    "normalize": lambda h: F.normalize(h, dim=0),
    "baddbmm": lambda h: torch.baddbmm(batch2=(m := h.transpose(0, 1)), batch1=m @ m.mT, input=m).transpose(0, 1),
    "addmm": lambda h: torch.addmm(h[:, 0], h[:, 0] @ h[:, 0].T, h[:, 0]),
    "inner": lambda h: torch.inner(h[:, 0], h[:, 0]) @ h[:, 0],
    "einsum-implicit": lambda h: torch.einsum("nd,md", h[:, 0], h[:, 0])[:, :1] * h[:, 0],
    "put": lambda h: torch.zeros_like(h).put(torch.arange(h.numel()).flip(0).view(h.shape), h),
    "as-strided": lambda h: h.as_strided(h.shape, h.stride(), 0),
    "conv-over": lambda h: F.conv1d(h.movedim(0, 1), torch.ones(len(h), len(h), 1).double()).movedim(1, 0),
    "bilinear-over": lambda h: F.bilinear(h[:, 0].T, h[:, 0].T, torch.ones(len(h), len(h), len(h)).double()).T,
    "attention-keys": lambda h: F.scaled_dot_product_attention(query=h[:, 0], value=h[:, 0], key=h[:, 0]),
    "diff": lambda h: torch.cat([h[:1], h.diff(dim=0)]),
    "kron": lambda h: torch.kron(h[:, 0], h.new_ones(1, 1)),
    "matrix-power": lambda h: torch.linalg.matrix_power(h[:, 0] @ h[:, 0].T, 2) @ h[:, 0],
    "solve": lambda h: torch.linalg.solve(h[:, 0] @ h[:, 0].T + torch.eye(len(h)).double(), h[:, 0]),
    "inverse": lambda h: torch.linalg.inv(h[:, 0] @ h[:, 0].T + torch.eye(len(h)).double()) @ h[:, 0],
    "matrix-exp": lambda h: torch.matrix_exp(h[:, 0] @ h[:, 0].T * 0.01) @ h[:, 0],
    "svd": lambda h: torch.linalg.svd(h[:, 0], full_matrices=False)[0][:, :1] * h[:, 0],
    "cov": lambda h: h[:, 0] @ torch.cov(h[:, 0].T),
    "cdist-rows": lambda h: torch.cdist(h[:, 0], h[:, 0]).sum(1, keepdim=True) * h[:, 0],
    "cosine": lambda h: F.cosine_similarity(h[:, None, 0], h[None, :, 0], -1) @ h[:, 0],
    "aten": lambda h: torch.ops.aten.flip(h, [0]),
    "trapezoid": lambda h: torch.cumulative_trapezoid(h, dim=0).mean(0) * h,
    "roll-flat": lambda h: h.roll(1),
    "shuffled": lambda h: F.channel_shuffle(h.transpose(0, 1)[..., None], len(h))[..., 0].transpose(0, 1),
}
MIXERS |= {name: lambda mix=mix: between(lambda s, x: mix(x)) for name, mix in EXPRESSIONS.items()}


class Foreign(torch.autograd.Function):
    """Computes in sight of no torch function."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def written(s, x):
    y = s.start.expand(N, 2, D).clone()
    y[:, 1].copy_(x[:, 0])
    return s.b(y)


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(D, D))


@pytest.mark.parametrize("T", [N, 7], ids=["T=n", "T=7"])
@pytest.mark.parametrize("name", MIXERS)
def test_mixed_samples_are_named(name, T):
    case = problem(MIXERS[name], "x", T=T, cache_options={"fallback": False}).record()
    before = copy.deepcopy([p.detach() for p in case.model.parameters()])
    with pytest.raises(RuntimeError, match=r"not attributed: .*; the scores cover"):
        case.attribute()
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), before, strict=True))


def test_named_once_without_strict():
    case = problem(MIXERS["cumsum"], "x", cache_options={"strict": False, "fallback": False})
    with pytest.warns(UserWarning, match=r"not attributed: b.weight, b.bias; the scores cover 75.0% of the parameters"):
        case.record().attribute()
    case.record().attribute()  # silent: warnings of the package are errors here


@pytest.mark.parametrize("options", [{"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=["padding", "frequency"])
@pytest.mark.parametrize("how", ["function", "subclass"])
def test_gradients_that_are_not_derivatives(how, options):
    """An embedding leaves its padding out of the gradient, whatever pulls on it: here the head tied to it."""

    class Scaled(nn.Embedding):
        def forward(self, i):
            return 2 * super().forward(i)

    if how == "function":
        model = lambda: Fn(lambda s, i: torch.tanh(F.embedding(i, s.w, **options)) @ s.w.T, w=normal(VOCABULARY, D))  # noqa: E731
    else:
        model = lambda: Fn(lambda s, i: torch.tanh(s.e(i)) @ s.e.weight.T, e=Scaled(VOCABULARY, D, **options))  # noqa: E731
    case = problem(model, "ids").warm().record()
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_loss_by_loss(case)]))


def test_clipped_and_unscaled_gradients():
    case = problem(lambda: between(lambda s, x: torch.tanh(x)), "x").warm()
    torch.manual_seed(3)
    with case.cache:
        case.optimizer.zero_grad()
        (case.shares(case.model(*case.inputs)).sum() * 1024).backward()
    for p in case.model.parameters():
        p.grad /= 1024
    norm = nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
    assert norm > 0.1
    P = case.direction()
    close(case.attribute(), torch.stack([inner(P, g) for g in gradients_one_by_one(case)]) * 0.1 / (norm + 1e-6))


def test_edited_gradients():
    case = problem(lambda: nn.Linear(D, 3), "x").warm().record()
    nn.utils.clip_grad_value_(case.model.parameters(), 0.01)
    with pytest.raises(ValueError, match="edited element by element"):
        case.attribute()


@pytest.mark.parametrize("extra", ["penalty", "gradients-from-before", "gradient-penalty", "partly-unseen"])
def test_gradients_from_elsewhere(extra):
    """Scores that do not add up to the step's gradient are told: once, or by an error."""
    model = Fn(lambda s, x: s.b(torch.tanh(s.a(x))), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    if extra == "partly-unseen":
        model = Fn(lambda s, x: s.b(Hidden.apply(s.a(x), s.a.weight)), a=nn.Linear(D, D), b=nn.Linear(D, 2))
    torch.manual_seed(0)
    case = Problem(model.double(), (inputs("x", N, 7, 1),), (inputs("x", 4, 7, 2),), cache_options={"fallback": False}).warm()
    case.optimizer.zero_grad()
    if extra == "gradients-from-before":
        (model(-case.inputs[0]) ** 2).sum().backward()
    with case.cache:
        x = case.inputs[0].requires_grad_(extra == "gradient-penalty")
        loss = case.shares(model(x)).sum()
        if extra == "penalty":
            loss = loss + 10 * sum(p.square().sum() for p in model.parameters())
        if extra == "gradient-penalty":
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = loss + 1000 * g.square().sum()
        loss.backward()
    # what passed a function of one's own is not told apart behind it; elsewhere a sum tells
    told = "not attributed: b.weight, b.bias" if extra == "partly-unseen" else "the scores add up to"
    with pytest.raises(RuntimeError, match=told):
        case.attribute()


class Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


@pytest.mark.parametrize("penalty", [0.0, 10.0], ids=["whole", "penalty"])
@pytest.mark.parametrize("way", ["attribute", "midpoint", "lookahead"])
def test_the_sum_is_checked_beside_what_is_not_attributed(way, penalty):
    """The parameters that calls explain have to add up, whatever else is missing; also in a step that foresees."""
    torch.manual_seed(0)
    model = Fn(lambda s, x: Hidden.apply(s.b(x), s.a.weight), a=nn.Linear(D, D, bias=False), b=nn.Linear(D, D)).double()
    optimizer = torch.optim.Adam(model.parameters())
    x = inputs("x", N, 7, 1).double()
    loss = lambda c: model(x).square().sum() + c * sum(p.square().sum() for p in model.b.parameters())  # noqa: E731
    val = lambda: model(x.flip(0) + 1).square().sum()  # noqa: E731
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "attribute":
            cache = ag.LayerCache(model, val)
            with cache:
                loss(penalty).backward()
            ag.attribute(cache, optimizer)
        else:
            run = ag.InRun(model, optimizer, val, way)
            for step in range(12):
                run.batch(range(N))
                loss(penalty if step > 9 else 0.0).backward()  # lookahead foresees from here on
                optimizer.step()
                optimizer.zero_grad()
            run.close()
    told = " ".join(str(w.message) for w in caught)
    assert "not attributed: a.weight" in told
    assert ("but the covered parameters' gradient to" in told) == bool(penalty)


@pytest.mark.parametrize("T", [N, 7], ids=["T=n", "T=7"])
def test_positions_as_an_argument(T):
    """Where there are as many tokens as samples, nothing tells the argument from a batch: named, not scored wrongly."""
    model = Fn(
        lambda s, i, p: s.h(s.e(i) + s.p(p)), e=nn.Embedding(VOCABULARY, D), p=nn.Embedding(9, D), h=nn.Linear(D, 2)
    ).double()
    case = Problem(model, (inputs("ids", N, T, 1), torch.arange(T)), (inputs("ids", 4, T, 2), torch.arange(T)))
    case.cache.fallback = False
    case.record()
    if T == N:
        with pytest.raises(RuntimeError, match=r"not attributed: h.weight, h.bias"):
            case.attribute()
    else:
        P = case.direction()
        close(case.attribute(), torch.stack([inner(P, g) for g in gradients_loss_by_loss(case)]))
