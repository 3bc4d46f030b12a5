"""Rotation of q and k alone: for attention that does not rotate, and for the backward pass."""

import triton
import triton.language as tl
from torch import Tensor

from .configs import ROTATION
from .launch import check, launch
from .tiles import turned_rows

__all__ = ["rotate", "rotate_kernel"]


@triton.jit(do_not_specialize=["tokens"])
def rotate_kernel(
    QKV, COS, SIN, OUT,
    tokens, heads, stride_image, stride_token, stride_part, stride_head,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program rotates BLOCK tokens of one head of q or k."""
    blocks = tl.cdiv(tokens, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    part = tl.program_id(0) // blocks // heads % 2
    image = (tl.program_id(0) // blocks // heads // 2).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows[:, None] < tokens
    channels = tl.arange(0, D)
    source = QKV + image * stride_image + part * stride_part + head.to(tl.int64) * stride_head
    x = tl.load(source + rows[:, None].to(tl.int64) * stride_token + channels[None, :], mask=inside, other=0.0)
    table = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    cos = tl.load(COS + table, mask=inside, other=0.0)
    sin = tl.load(SIN + table, mask=inside, other=0.0)
    turned = turned_rows(x.to(tl.float32), cos, sin, BLOCK, D).to(x.dtype)
    target = OUT + ((image * tokens + rows[:, None]) * 2 + part) * heads * D + head * D
    tl.store(target + channels[None, :], turned, mask=inside)


def rotate(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor,  # [N or T, D/2] float32, or float16 for qkv of 16 bits
    sin: Tensor,  # [N or T, D/2], likewise
) -> Tensor:
    """Rotated q and k, [B, N, 2, H, D] or [T, 2, H, D].

    Raises: ValueError for shapes, dtypes and widths that the kernel is not made for.
    """
    shape = check(qkv, cos, sin)
    out = qkv.new_empty((*shape.lead, 2, shape.heads, shape.width))
    if out.numel():
        launch(
            rotate_kernel, triton.cdiv(shape.tokens, ROTATION.block_m) * shape.images * 2 * shape.heads, ROTATION,
            qkv, cos, sin, out, shape.tokens, shape.heads, *shape.strides, D=shape.width, BLOCK=ROTATION.block_m,
        )  # fmt: skip
    return out
