"""What the tests compare with: written from the definitions, sharing no code with the package.

The direction ``P`` comes from steps that the real optimizer takes on copies; the scores ``< P , g_i >`` from batches of one
through plain autograd, and from one forward-mode derivative of the vector of all per-sample losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import adam_ghost as ag


def losses(out: Tensor) -> Tensor:
    """``[n]``: a curved loss of each row of ``out``."""
    rows = out.flatten(1)
    return (rows - 0.3).square().mean(1) + rows[:, 0].sin() + rows[:, -1].cos()


@dataclass
class Problem:
    """A model about to take a step of Adam on ``inputs``, and what its per-sample losses are."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    val_inputs: tuple[Tensor, ...]
    reduction: str = "mean"
    losses: Callable[[Tensor], Tensor] = losses
    optimizer: torch.optim.Optimizer | None = None
    cache_options: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.optimizer is None:
            params = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
        self.cache = ag.LayerCache(self.model, self.val_loss, **{"strict": True} | self.cache_options)

    @property
    def n(self) -> int:
        return len(self.inputs[0])

    @property
    def params(self) -> dict[str, Tensor]:
        return {k: p for k, p in self.model.named_parameters() if p.requires_grad and p.grad is not None}

    def shares(self, out: Tensor, n: int | None = None) -> Tensor:
        """``[n]``: each sample's share of the loss that is trained on."""
        return self.losses(out) / ((n or self.n) if self.reduction == "mean" else 1)

    def val_loss(self) -> Tensor:
        training = self.model.training
        loss = self.losses(self.model.eval()(*self.val_inputs)).sum()
        self.model.train(training)
        return loss

    def backward(self) -> Tensor:
        """One forward and backward pass; the outputs."""
        self.optimizer.zero_grad()
        out = self.model(*self.inputs)
        self.shares(out).sum().backward()
        return out

    def warm(self, steps: int = 2) -> "Problem":
        """Real steps, so that the optimizer has a history."""
        for _ in range(steps):
            self.backward()
            self.optimizer.step()
        return self

    def record(self, seed: int = 3) -> "Problem":
        torch.manual_seed(seed)
        with self.cache:
            self.backward()
        return self

    def attribute(self, **options) -> Tensor:
        return ag.attribute(self.cache, self.optimizer, **options)

    def after_step(self, scale: float) -> dict[str, Tensor]:
        """The weights after the optimizer's own step with ``scale`` times the gradient, taken on a copy."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        for p, q in zip(self.model.parameters(), model.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad * scale
        optimizer.step()
        return {k: p.detach() for k, p in model.named_parameters() if k in self.params}

    def direction(self) -> dict[str, Tensor]:
        """Secant and midpoint, by their definitions: where steps with and without the gradient lead."""
        empty, full = self.after_step(0.0), self.after_step(1.0)
        held = {k: p.detach().clone() for k, p in self.params.items()}
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_((empty[k] + full[k]) / 2)
        val = torch.autograd.grad(self.val_loss(), list(self.params.values()), allow_unused=True)
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(held[k])
        P = {}
        for (k, p), v in zip(self.params.items(), val, strict=True):
            quotient = (empty[k] - full[k]) / torch.where(p.grad == 0, 1.0, p.grad)
            P[k] = torch.zeros_like(p) if v is None else v * torch.where(p.grad == 0, 0.0, quotient)
        return P


def inner(P: dict[str, Tensor], grads: dict[str, Tensor | None]) -> Tensor:
    return sum((P[k] * g).sum() for k, g in grads.items() if g is not None)


def gradients_one_by_one(problem: Problem) -> list[dict[str, Tensor | None]]:
    """Each sample's share of the gradient, from a batch of itself alone."""
    found = []
    for i in range(problem.n):
        out = problem.model(*(x[i : i + 1] for x in problem.inputs))
        share = problem.shares(out, problem.n).sum()
        grads = torch.autograd.grad(share, list(problem.params.values()), allow_unused=True)
        found.append(dict(zip(problem.params, grads, strict=True)))
    return found


def gradients_loss_by_loss(problem: Problem, seed: int = 3) -> list[dict[str, Tensor | None]]:
    """The same from the whole batch's graph: where the layers draw random numbers, or count over the batch."""
    torch.manual_seed(seed)
    shares = problem.shares(problem.model(*problem.inputs))
    found = []
    for share in shares:
        grads = torch.autograd.grad(share, list(problem.params.values()), retain_graph=True, allow_unused=True)
        found.append(dict(zip(problem.params, grads, strict=True)))
    return found


def derivative_of_losses(problem: Problem, P: dict[str, Tensor], seed: int = 3) -> Tensor:
    """``[n]``: the derivative along P of the vector of all samples' shares, in one forward-mode pass."""
    held = {k: p.detach() for k, p in problem.params.items()}

    def shares(values: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(seed)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return problem.shares(torch.func.functional_call(problem.model, values, problem.inputs))

    return torch.func.jvp(shares, (held,), ({k: P[k] for k in held},))[1]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` times the norm of ``want``; nothing but zeros is no comparison."""
    want = torch.as_tensor(want, dtype=got.dtype)
    assert got.shape == want.shape
    assert want.norm() > 0
    assert (got - want).norm() <= tolerance * want.norm(), f"off by {float((got - want).norm() / want.norm()):.2e}"
