"""Bad input: an error that names the thing, before anything is changed."""

from functools import partial

import pytest
import torch
from models import SEQUENCES, VOCABULARY, D, Embed, Fn, problem
from snapshots import everything, same
from torch import nn

import adam_ghost as ag


class Own(torch.optim.Adam):
    def step(self, closure=None):
        pass


def replaced(case, **changes):
    for name, value in changes.items():
        setattr(case, name, value)
    return case


def val(loss):
    """A change of the validation loss to what ``loss(case)`` returns."""

    def change(case):
        case.cache.validation.val_loss = lambda: loss(case)

    return change


def backward(case, **options):
    loss = case.val_loss()
    loss.backward(**options)
    return loss


def outside(case):
    case.model.extra = nn.Parameter(torch.zeros(2).double())
    case.model.extra.grad = torch.ones(2).double()


def spoil_gradient(case, value):
    next(case.model.parameters()).grad.flatten()[0] = value


def sparse(case):
    p = next(case.model.parameters())
    p.grad = p.grad.to_sparse()


BAD = {
    "lbfgs": (lambda c: replaced(c, optimizer=torch.optim.LBFGS(c.model.parameters())), TypeError, "opt_state must be .*got LBFGS"),
    "asgd": (lambda c: replaced(c, optimizer=torch.optim.ASGD(c.model.parameters())), TypeError, "opt_state must be .*got ASGD"),
    "own-step": (lambda c: replaced(c, optimizer=Own(c.model.parameters())), TypeError, "opt_state must be .*got Own"),
    "state-dict": (lambda c: replaced(c, optimizer=c.optimizer.state_dict()), TypeError, "opt_state must be .*got dict"),
    "no-cache": (lambda c: replaced(c, cache=c.model), TypeError, "layer_cache must be an adam_ghost.LayerCache, got NanoGPT"),
    "not-held": (outside, ValueError, "'extra' has a gradient but is not among the optimizer's parameters"),
    "no-val-loss": (lambda c: setattr(c.cache.validation, "val_loss", None), ValueError, "a validation loss is needed"),
    "val-detached": (val(lambda c: c.val_loss().detach()), ValueError, "val_loss returned a tensor without a graph"),
    "val-backward": (val(backward), RuntimeError, "val_loss called backward"),
    "val-backward-kept": (val(partial(backward, retain_graph=True)), RuntimeError, "val_loss called backward"),
    "val-float": (val(lambda c: float(c.val_loss().detach())), TypeError, "val_loss must return a tensor.*got float"),
    "val-matrix": (val(lambda c: c.val_loss() * torch.ones(2, 2)), ValueError, r"val_loss must return .*\[2, 2\]"),
    "val-empty": (val(lambda c: c.val_loss() * torch.ones(0)), ValueError, r"val_loss must return .*\[0\]"),
    "val-nan": (val(lambda c: c.val_loss() * float("nan")), ValueError, "val_loss is not finite: nan"),
    "val-inf-target": (val(lambda c: c.val_loss() * torch.tensor([1.0, float("inf")])), ValueError, "val_loss is not finite"),
    "gradient-nan": (lambda c: spoil_gradient(c, float("nan")), ValueError, "the gradient of 'tokens.weight' is not finite"),
    "gradient-inf": (lambda c: spoil_gradient(c, float("inf")), ValueError, "the gradient of 'tokens.weight' is not finite"),
    "gradient-sparse": (sparse, ValueError, "'tokens.weight' has a sparse gradient"),
    "zero-grad": (lambda c: c.optimizer.zero_grad(), ValueError, "no parameter has a gradient.*before optimizer.zero_grad"),
    "after-step": (lambda c: c.optimizer.step(), ValueError, r"weights changed since `with cache`.*before optimizer.step\(\)"),
    "cleared": (lambda c: c.cache.clear(), ValueError, "nothing was recorded"),
}


@pytest.mark.parametrize("call", ["attribute", "gram", "exact_shapley"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, call):
    change, error, message = BAD[name]
    if call == "gram" and "val" in name:
        pytest.skip("gram takes no validation loss")
    case = problem(*SEQUENCES["nanogpt"]).warm().record()
    optimizer, model = case.optimizer, case.model
    change(case)
    before = everything(model, optimizer)
    if call == "exact_shapley" and name in ("val-detached", "val-backward", "val-backward-kept"):
        pytest.skip("the game looks at losses alone")
    with pytest.raises(error, match=message):
        getattr(ag, call)(case.cache, case.optimizer)
    same({k: x.nan_to_num() for k, x in everything(model, optimizer).items()}, {k: x.nan_to_num() for k, x in before.items()})


@pytest.mark.parametrize(
    "call, options, message",
    [
        ("attribute", {"rule": "paper"}, "rule must be one of secant, tangent, frozen, sgd, got 'paper'"),
        ("attribute", {"at": "end"}, "at must be one of midpoint, gauss, lookahead, current, got 'end'"),
        ("gram", {"preconditioner": "adam"}, "preconditioner must be .*got 'adam'"),
        ("exact_shapley", {"permutations": 0}, "permutations must be at least 1, got 0"),
    ],
    ids=["rule", "at", "preconditioner", "permutations"],
)
def test_bad_options(call, options, message):
    case = problem(*SEQUENCES["nanogpt"]).record()
    with pytest.raises(ValueError, match=message):
        getattr(ag, call)(case.cache, case.optimizer, **options)


def test_bad_cache():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        ag.LayerCache([nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"val_loss must be callable.*got Tensor"):
        ag.LayerCache(nn.Linear(2, 2), torch.tensor(1.0))


def test_inside_the_block():
    case = problem(*SEQUENCES["nanogpt"])
    with case.cache:
        case.backward()
        with pytest.raises(ValueError, match="after the `with cache` block"):
            case.attribute()
    case.attribute()


def test_nested_and_repeated():
    case = problem(*SEQUENCES["nanogpt"])
    with case.cache, pytest.raises(ValueError, match="recording already: `with cache` cannot be nested"), case.cache:
        pass
    first = case.record().attribute()
    case.record()
    case.record()  # the one before is forgotten
    torch.testing.assert_close(case.attribute(), first, rtol=0, atol=0)
    case.cache.clear()
    case.record()


def test_forward_without_a_recording():
    case = problem(*SEQUENCES["nanogpt"])
    case.backward()
    with pytest.raises(ValueError, match="nothing was recorded: run the model's forward and backward pass inside"):
        case.attribute()
    with case.cache:
        case.model(*case.inputs)
    with pytest.raises(ValueError, match="nothing was recorded"):
        case.attribute()


@pytest.mark.parametrize(
    "norm, mode, message",
    [
        (nn.BatchNorm1d(4), True, "'1' is a BatchNorm1d in training mode: it mixes the samples.*eval"),
        (nn.BatchNorm1d(4, affine=False), True, "'1' is a BatchNorm1d in training mode"),
        (nn.BatchNorm1d(4, track_running_stats=False), False, "'1' is a BatchNorm1d without running statistics"),
    ],
    ids=["affine", "plain", "eval-without-statistics"],
)
def test_batch_norm(norm, mode, message):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), norm).train(mode)
    case = problem(lambda: model, (2, 7))
    with pytest.raises(ValueError, match=message), case.cache:
        case.backward()
    assert not case.cache.recording and all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("layer", [nn.MultiheadAttention(D, 2), nn.LSTM(D, D)], ids=["attention", "lstm"])
def test_batch_is_not_first(layer):
    model = Fn(lambda s, x: s.layer(*[x] * (3 if isinstance(layer, nn.MultiheadAttention) else 1))[0], layer=layer)
    case = problem(lambda: model, "x")
    with pytest.raises(ValueError, match=r"'layer' \(\w+\) has batch_first=False, but its batch is dimension 0"), case.cache:
        case.backward()
    assert not case.cache.recording


def test_two_batch_sizes():
    case = problem(*SEQUENCES["nanogpt"])
    other = case.inputs[0][:3].clone()  # taken from the batch inside, it would be known as three of its samples
    with pytest.raises(ValueError, match="batches of 5 and 3 samples"), case.cache:
        case.model(case.inputs[0])
        case.model(other)


def test_sparse_embedding():
    case = problem(lambda: Embed(nn.Embedding(VOCABULARY, D, sparse=True)), "ids").record()
    with pytest.raises(ValueError, match=r"'embedding.weight' has a sparse gradient"):
        case.attribute()


def test_frozen_model():
    case = problem(*SEQUENCES["layernorm"])
    for p in case.model.parameters():
        p.requires_grad_(False)
    x = case.inputs[0].requires_grad_()
    with case.cache:
        case.shares(case.model(x)).sum().backward()
    with pytest.raises(ValueError, match="nothing was recorded"):
        case.attribute()
