"""A layer that scales its input, as somebody would add it: one file, one line of registration."""

import torch
from torch import nn

import adam_ghost.scores.forms
from adam_ghost.scores.forms import Form
from adam_ghost.scores.shapes import samples_first


class Scale(nn.Module):
    """``x * weight.exp()``: no torch.nn layer does so, and it is not linear in its parameter."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(d))

    def forward(self, x):
        return x * self.weight.exp()


def gradients(call, n):
    """``[n, d]``: each sample's gradient of the weight through the call."""
    x, b = (samples_first(t, call.outputs[0], n) for t in (call.input, call.grad_output[0]))  # [n, T, ..., d]
    return (x * b).flatten(1, -2).sum(1) * call.fn.weight.detach().exp()


def scores(call, P, asked):
    return gradients(call, asked.n) @ P[call.name_of(call.fn.weight)].T


def sample_gradients(call, name, n, block):
    return gradients(call, n)[:, block]


adam_ghost.scores.forms.register("scale", Form(scores, sample_gradients), lambda module: isinstance(module, Scale))
