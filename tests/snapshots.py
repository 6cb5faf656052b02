"""What a call of the library may not change: all that training depends on, and what hangs on a model."""

import torch


def everything(model, optimizer):
    """All that training depends on, by name."""
    found = {f"model.{k}": x for k, x in model.state_dict().items()}
    found |= {f"grad.{k}": p.grad for k, p in model.named_parameters()}
    found |= {f"optimizer.{i}.{k}": x for i, s in optimizer.state_dict()["state"].items() for k, x in s.items()}
    found |= {f"mode.{k}": torch.tensor(m.training) for k, m in model.named_modules()}
    return {k: x.detach().to_dense().clone() for k, x in found.items() if x is not None} | {"random": torch.get_rng_state()}


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


def residue(model):
    """Everything that hangs on modules and parameters, beyond parameters and buffers."""
    hooks = {
        (name, k): len(v) for name, m in model.named_modules() for k, v in vars(m).items() if isinstance(v, dict) and "hook" in k
    }
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    on_parameters = {name: (p._backward_hooks, set(vars(p))) for name, p in model.named_parameters()}
    return hooks, attributes, on_parameters, torch.overrides._get_current_function_mode_stack()
