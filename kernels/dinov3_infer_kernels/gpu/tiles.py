"""Shared by the kernels: the place of a sequence, and the rotation of a tile.

Names inside kernels: upper case for tensors and compile-time constants, `row` and `key` for tokens of a tile.
Offsets of images are int64, so that tensors may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

__all__ = ["sequence", "turned_columns", "turned_rows"]


@triton.jit
def sequence(CU_SEQLENS, index, tokens, stride_image, stride_token, PACKED: tl.constexpr):
    """For one image: its tokens, its first row among all rows, the offset of that row in qkv, its first table row."""
    if PACKED:
        first = tl.load(CU_SEQLENS + index)
        count = tl.load(CU_SEQLENS + index + 1) - first
        return count, first.to(tl.int64), first.to(tl.int64) * stride_token, first
    else:
        first = index.to(tl.int64)
        return tokens, first * tokens, first * stride_image, 0


@triton.jit
def turned_rows(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Rotates tokens as rows, [ROWS, D], channel k with k + D/2, shuffling no data; cos and sin [ROWS, D/2]."""
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    first, second = x.reshape(ROWS, 2, D // 2).permute(0, 2, 1).split()
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return turned.permute(0, 2, 1).reshape(ROWS, D)


@triton.jit
def turned_columns(x, cos, sin, COLUMNS: tl.constexpr, D: tl.constexpr):
    """The same for tokens as columns, [D, COLUMNS]; cos and sin [D/2, COLUMNS]."""
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    first, second = x.reshape(2, D // 2, COLUMNS).permute(1, 2, 0).split()
    turned = tl.join(first * cos - second * sin, second * cos + first * sin)
    return turned.permute(2, 0, 1).reshape(D, COLUMNS)
