"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter stores bfloat16 as uint16.  It multiplies these integers in `tl.dot`, truncates when it converts float32
to bfloat16, and adds bits in arithmetic.  This module repairs the products and the rounding (to nearest even).  Other
arithmetic in bfloat16 raises, since our kernels have none.
"""

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the repairs until the end of a test."""
    dot, cast, binary, fp_to_fp = (
        getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl", "binary_op", "create_fp_to_fp")
    )

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (TensorHandle(widened(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(src.data), tl.float32)
        if tl.bfloat16 in pair:
            raise NotImplementedError(f"{pair} in the interpreter")
        return cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, mode: Any) -> Any:
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, mode)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
            raise NotImplementedError("arithmetic of bfloat16 in the interpreter")
        return binary(self, lhs, rhs, op)

    for made in (create_dot, cast_impl, create_fp_to_fp, binary_op):
        monkeypatch.setattr(InterpreterBuilder, made.__name__, made)
