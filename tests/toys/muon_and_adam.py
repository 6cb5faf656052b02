"""One class that steps matrices by Muon and the rest by Adam, as speed-run trainers write it, and its adapter."""

import torch

from adam_ghost.optim import AdamState, MuonState, Several, register


class MuonAndAdam(torch.optim.Optimizer):
    def __init__(self, matrices, rest):
        muon = {"params": matrices, "use_muon": True, "lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
        adam = {"params": rest, "use_muon": False, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        super().__init__([muon, adam], {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * (self.muon if group["use_muon"] else self.adam)(group, p, self.state[p]))

    def muon(self, group, p, state):
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        x = p.grad.lerp_(buffer, group["momentum"]).bfloat16()  # in place, to save memory
        x = x.mT if len(p) > p.shape[1] else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        x = x.mT if len(p) > p.shape[1] else x
        return x.to(p) * max(1, len(p) / p.shape[1]) ** 0.5

    def adam(self, group, p, state):
        step = state["step"] = state.get("step", 0) + 1
        moments = [state.setdefault(k, torch.zeros_like(p)) for k in ("exp_avg", "exp_avg_sq")]
        for moment, new, beta in zip(moments, (p.grad, p.grad**2), group["betas"], strict=True):
            moment.lerp_(new, 1 - beta)
        m, v = (moment / (1 - beta**step) for moment, beta in zip(moments, group["betas"], strict=True))
        return m / (v.sqrt() + group["eps"])


def read(optimizer):
    matrices, rest = ([g for g in optimizer.param_groups if g["use_muon"] == is_muon] for is_muon in (True, False))
    return Several([MuonState.of_groups(optimizer, matrices), AdamState.of_groups(optimizer, rest, decoupled=True)])


register(MuonAndAdam, read, edits_gradients=True)
