"""Ragged samples brought to where steps begin: rows of zeros fill up each sample's last step.

A tile of tokens then never holds two samples, whatever their lengths, and can be fetched by tensor descriptor. The copy costs a
pass over the rows; what it saves is a masked, pointer-wise fetch in every tile of every column of the weight.
"""

import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Steps(NamedTuple):
    """``steps`` steps of tokens that hold ``samples`` ragged samples, and in the end nothing."""

    samples: int
    steps: int
    start_of: Tensor  # [samples + 1] int32: the step that a sample begins with
    sample_of: Tensor  # [steps + 1] int32: the sample of a step, `samples` past the last one
    offsets: Tensor  # [samples + 1]


_last: tuple[weakref.ref, int, int, int, Steps] | None = None  # of a batch: its layers share it


def steps_of(offsets: Tensor, N: int, BT: int) -> Steps:
    """The steps of ``BT`` tokens of samples ``offsets[i] .. offsets[i + 1]`` among ``N`` rows; no value is read by the host."""
    global _last
    if _last is not None and _last[0]() is offsets and _last[1:4] == (offsets._version, N, BT):
        return _last[4]
    n = len(offsets) - 1
    steps = triton.cdiv(N, BT) + n  # at most
    start_of = torch.empty(n + 1, dtype=torch.int32, device=offsets.device)
    start_of[0].zero_()
    torch.cumsum((offsets.diff() + (BT - 1)) // BT, 0, out=start_of[1:])
    at = torch.arange(steps + 1, dtype=torch.int32, device=offsets.device)
    sample_of = torch.searchsorted(start_of[1:], at, right=True, out_int32=True)
    found = Steps(n, steps, start_of, sample_of, offsets)
    _last = weakref.ref(offsets), offsets._version, N, BT, found
    return found


@triton.jit(do_not_specialize=["n"])
def _align(x, x_t, x_d, out, offsets, start_of, sample_of, n, d, BT: tl.constexpr, BD: tl.constexpr):
    s, f = tl.program_id(0), tl.program_id(1) * BD
    o_t, o_f = tl.arange(0, BT), f + tl.arange(0, BD)
    sample = tl.load(sample_of + s)
    there = sample < n
    begin = tl.load(offsets + sample, mask=there, other=0).to(tl.int64)
    stop = tl.load(offsets + sample + 1, mask=there, other=0).to(tl.int64)
    row = begin + (s - tl.load(start_of + sample, mask=there, other=0)) * BT + o_t
    m_f = (o_f < d)[None, :]
    b_x = tl.load(x + row[:, None] * x_t + o_f.to(tl.int64)[None, :] * x_d, mask=(row < stop)[:, None] & m_f, other=0.0)
    to = tl.cast(s, tl.int64) * BT + o_t
    tl.store(out + to[:, None] * d + o_f[None, :], b_x, mask=m_f)


def aligned(x: Tensor, plan: Steps, BT: int) -> Tensor:
    """Rows ``[N, d]`` -> ``[1, steps * BT, d]``, every sample from its first step on, zeros between them."""
    d = x.shape[1]
    out = torch.empty(1, plan.steps * BT, d, dtype=x.dtype, device=x.device)
    BD = min(256, triton.next_power_of_2(d))
    _align[(plan.steps, triton.cdiv(d, BD))](
        x, *x.stride(), out, plan.offsets, plan.start_of, plan.sample_of, plan.samples, d, BT, BD, num_warps=4
    )
    return out
