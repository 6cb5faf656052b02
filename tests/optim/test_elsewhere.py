"""Optimizers that are not PyTorch's, known by name: as their papers have them, and, where they are installed, themselves."""

import pytest
import torch
from oracles import close
from toys import elsewhere
from toys.muon_and_adam import MuonAndAdam

from adam_ghost.inrun import InRun
from adam_ghost.optim import edits_gradients, read_optimizer


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def package(module, name, **options):
    """An optimizer of a package; its import registers constants, which PyTorch warns of."""

    def make(params):
        return getattr(pytest.importorskip(module, exc_type=ImportError), name)(params, lr=0.01, weight_decay=0.1, **options)

    return pytest.param(make, id=f"{module.split('.')[0]}-{name}")


INSTALLED = [
    package("lion_pytorch", "Lion"),
    package("schedulefree", "AdamWScheduleFree", warmup_steps=3),
    *(package("torchao.optim", name) for name in ("AdamW8bit", "Adam8bit", "AdamW4bit", "AdamWFp8")),
    *(package("bitsandbytes.optim", name) for name in ("AdamW8bit", "Adam8bit", "AdamW", "Lion8bit", "Lion")),
]
PAPERS = {
    "Lion": lambda ps: elsewhere.Lion(ps, lr=0.1, weight_decay=0.2),
    "schedule-free": lambda ps: elsewhere.AdamWScheduleFree(ps, lr=0.1, weight_decay=0.2, betas=(0.9, 0.8)),
    "Muon and Adam": lambda ps: MuonAndAdam(ps[:1], ps[1:]),
}


def give_gradients(params, step):
    for p in params:
        p.grad = torch.randn(p.shape) * 2.0 ** -(step % 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", INSTALLED)
def test_what_is_installed(make):
    """Steps of the packages themselves, in float32; state of few bits for the first parameter, which is large enough."""
    params = [torch.randn(s, requires_grad=True) for s in ((64, 128), (5,))]
    opt = make(params)
    if hasattr(opt, "train"):
        opt.train()
    for step in range(5):
        give_gradients(params, step)
        state = read_optimizer(opt)
        foretold, before = [state.weights(p, p.grad) for p in params], [p.detach().clone() for p in params]
        opt.step()
        for p, want, was in zip(params, foretold, before, strict=True):
            close(want - was, (p - was).detach(), 2e-3)  # weights are rounded, and moved by little


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", PAPERS.values(), ids=PAPERS)
def test_as_the_papers_have_it(make):
    params = [torch.randn(s, requires_grad=True) for s in ((4, 3), (5,))]
    opt = make(params)
    trajectory = earlier = None
    for step in range(6):
        give_gradients(params, step)
        grads = [p.grad.clone() for p in params]
        read = read_optimizer(opt)
        if trajectory is not None:
            trajectory = trajectory.advanced(earlier, read.scalars(params))
            for x, p in zip(trajectory.parameters(), params, strict=True):
                close(x, p.detach(), 1e-2 if isinstance(opt, MuonAndAdam) and p.ndim == 2 else 1e-12)
        kept = read.kept(params)
        trajectory, earlier = kept.rebuild(kept.tensors), grads
        foretold = [read.weights(p, p.grad) for p in params]
        opt.step()
        for p, want in zip(params, foretold, strict=True):
            # Muon's iterations, in bfloat16, are grouped in another way
            close(want, p.detach(), 1e-2 if isinstance(opt, MuonAndAdam) and p.ndim == 2 else 1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["Lion", "schedule-free"])
def test_secant(name):
    params = [torch.randn(40, 3, requires_grad=True)]
    opt = PAPERS[name](params)
    for step in range(4):
        give_gradients(params, step)
        opt.step()
    give_gradients(params, 0)
    state, (p,), g = read_optimizer(opt), params, params[0].grad
    val = torch.randn(2, *p.shape)
    found = state.linearize(params, [g], [val], "secant", [torch.empty_like(val)])
    quotient = (state.weights(p, torch.zeros_like(p)) - state.weights(p, g)) / g
    assert ((quotient == 0).any() and (quotient != 0).any()) or name != "Lion"
    assert (found.P[0] - val * quotient).abs().max() <= 1e-11 * quotient.abs().max()


def test_what_edits_gradients_says_so():
    params = [torch.zeros(3, 3, requires_grad=True)]
    assert edits_gradients(PAPERS["schedule-free"](params)) and not edits_gradients(PAPERS["Lion"](params))


def test_eight_bits_as_bitsandbytes_keeps_them():
    """What codes stand for: an entry of the map, times the block's largest."""
    from adam_ghost.optim.quantized import _dequantized

    codes, table = torch.randint(256, (3, 100), dtype=torch.uint8), torch.linspace(-1, 1, 256)
    held = {"state1": codes, "qmap1": table, "absmax1": torch.tensor([2.0, 5.0])}
    found = _dequantized(held, "1").flatten()
    for i in (0, 255, 256, 299):
        assert found[i] == table[codes.flatten()[i].long()] * (2.0 if i < 256 else 5.0)


def test_adam_and_lion_alone_are_known_of_bitsandbytes():
    class LAMB(torch.optim.Optimizer):
        optimizer_name = "lamb"

        def step(self):
            pass

        def get_config(self, g, i, group):
            return group

    from adam_ghost.optim.quantized import _of_bitsandbytes

    with pytest.raises(TypeError, match="Adam, AdamW and Lion are known, got LAMB"):
        _of_bitsandbytes(LAMB([torch.zeros(3, requires_grad=True)], {}))


@pytest.mark.parametrize("schedule, reason", [("window", "whose derivative is zero"), ("lookahead", "is not known before it is")])
def test_what_a_sign_does_not_allow_is_refused(schedule, reason):
    model = torch.nn.Linear(3, 2)
    loss = lambda: model(torch.ones(1, 3)).sum()  # noqa: E731
    with pytest.raises(ValueError, match=rf"schedule='{schedule}' .*Lion steps by a sign.*{reason}"):
        InRun(model, [elsewhere.Lion(model.parameters(), lr=0.1)], loss, schedule, train_loss=lambda x: model(x).sum())
