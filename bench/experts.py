"""The benchmarks' GPT with a mixture of experts in each block: as many operations to a token as the dense model has."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adam_ghost.demo.model import GPT, Block

TOP = 2  # experts to a token, each of a dense perceptron's width / TOP


class Experts(nn.Module):
    """A router, and perceptrons by grouped products of tokens that are sorted by expert."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(0.02 * torch.randn(experts, width, 4 * width // TOP))
        self.down = nn.Parameter(0.02 * torch.randn(experts, 4 * width // TOP, width))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)  # [M, width]
        weights, chosen = self.router(rows).softmax(-1).topk(TOP)
        order = chosen.flatten().argsort(stable=True)  # [TOP M]
        numbers = torch.arange(len(self.up), device=x.device)
        ends = torch.searchsorted(chosen.flatten()[order], numbers, right=True).int()
        hidden = F.gelu(F.grouped_mm(rows[order // TOP], self.up.to(rows.dtype), offs=ends))
        out = F.grouped_mm(hidden, self.down.to(rows.dtype), offs=ends) * weights.flatten()[order].unsqueeze(1)
        return torch.zeros_like(rows).index_add(0, order // TOP, out.to(rows.dtype)).view_as(x)


class ExpertBlock(Block):
    def __init__(self, width: int, heads: int, experts: int):
        super().__init__(width, heads)
        del self.up, self.down
        self.experts = Experts(width, experts)

    def mlp(self, x: Tensor) -> Tensor:
        return self.experts(x)


def with_experts(model: GPT, experts: int) -> GPT:
    """``model`` with its blocks' perceptrons replaced."""
    width = model.norm.normalized_shape[0]
    model.blocks = nn.ModuleList(ExpertBlock(width, block.heads, experts) for block in model.blocks)
    return model
