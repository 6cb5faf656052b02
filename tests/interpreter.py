"""Repairs of Triton 3.6's CPU interpreter, without which bfloat16 kernels cannot be tested on it.

The interpreter keeps bfloat16 as the ``uint16`` of its bits, and forgets so: products and sums work on the bits, and casts
from float32 truncate. Here bfloat16 operands become float32 before arithmetic, and results are rounded to nearest even.
With numpy 2.4 and later, 3.6.0 also fails to turn a one-element array into a loop bound.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(np.array(values, dtype=np.float32))
    return values.to(torch.bfloat16).view(torch.uint16).numpy()


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def _wrap(name: str, make) -> None:
    setattr(InterpreterBuilder, name, make(getattr(InterpreterBuilder, name)))


def _dot(original):
    return lambda self, a, b, acc, *rest: original(self, float32(a), float32(b), acc, *rest)


def _binary(original):
    def binary_op(self, left, right, op):
        if not (is_bfloat16(left) and is_bfloat16(right)):
            return original(self, left, right, op)
        out = op(widen(left.data), widen(right.data))
        return TensorHandle(out if out.dtype == bool else narrow(out), left.dtype.scalar)

    return binary_op


def _cast(original):
    def cast(self, source, target, *rest):
        old, new = source.dtype.scalar, target.scalar
        if old == new or tl.bfloat16 not in (old, new):
            return original(self, source, target, *rest)
        if old == tl.bfloat16:
            return original(self, float32(source), target, *rest) if new != tl.float32 else float32(source)
        return TensorHandle(narrow(source.data), new)

    return cast


def _loop_bounds(original):
    def patch(tensor, *scope):
        out = original(tensor, *scope)

        def index(self) -> int:
            return int(np.asarray(self.handle.data).squeeze())

        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return out

    return patch


def repair() -> None:
    _wrap("create_dot", _dot)
    _wrap("binary_op", _binary)
    _wrap("cast_impl", _cast)
    _wrap("create_fp_to_fp", _cast)
    interpreter._patch_lang_tensor = _loop_bounds(interpreter._patch_lang_tensor)
