"""Lion and schedule-free AdamW, from their papers, under the names of the packages that have them."""

import torch


class Lion(torch.optim.Optimizer):
    decoupled_wd = False

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                update = torch.sign(beta1 * m + (1 - beta1) * p.grad)
                p.copy_(p - group["lr"] * (update + group["weight_decay"] * p))
                m.copy_(beta2 * m + (1 - beta2) * p.grad)


class AdamWScheduleFree(torch.optim.Optimizer):
    """``y`` are the weights; ``x = (y - (1 - beta1) z) / beta1`` is the average."""

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, warmup_steps=3):
        running = {"k": 0, "r": 0.0, "weight_lr_power": 2.0, "weight_sum": 0.0, "lr_max": -1.0}
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup_steps": warmup_steps}
        super().__init__(params, own | running)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), t = group["betas"], group["k"] + 1
            lr = group["lr"] * min(1.0, t / group["warmup_steps"])
            group["lr_max"] = max(lr, group["lr_max"])
            weight = t ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            c = weight / group["weight_sum"]
            for p in group["params"]:
                state = self.state[p]
                z = state.setdefault("z", p.detach().clone())
                v = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                v.copy_(beta2 * v + (1 - beta2) * p.grad**2)
                x = (p - (1 - beta1) * z) / beta1
                p.grad.div_((v / (1 - beta2**t)).sqrt() + group["eps"])  # in place, to save memory
                z.sub_(lr * (p.grad + group["weight_decay"] * p))
                x = (1 - c) * x + c * z
                p.copy_(beta1 * x + (1 - beta1) * z)
            group["k"] = t


for kind, module in ((Lion, "lion_pytorch.lion_pytorch"), (AdamWScheduleFree, "schedulefree.adamw_schedulefree")):
    kind.step.__wrapped__.__module__ = module
