"""Forward: rotation and attention in one pass over the packed qkv projection.

A program owns BLOCK_M queries of one head of one image.  It rotates them once, walks over the keys, rotates each tile
on the way, and keeps a running softmax, so that rotated q and k and scores are never written to memory.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, precision, select, whole_heads
from .launch import LOG2_E, check, launch, near, tail
from .short import segments, short_kernel
from .tiles import sequence, turned_columns, turned_rows

__all__ = ["forward", "forward_kernel"]


@triton.jit
def _step(
    out, total, top, q, QKV, COS, SIN, keys, count, stride_token, stride_part, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values."""
    channels = tl.arange(0, D)
    k_at = QKV + stride_part + keys[None, :] * stride_token + channels[:, None]  # [D, BLOCK]
    v_at = QKV + 2 * stride_part.to(tl.int64) + keys[:, None] * stride_token + channels[None, :]  # [BLOCK, D]
    if MASKED:
        k = tl.load(k_at, mask=keys[None, :] < count, other=0.0)
        v = tl.load(v_at, mask=keys[:, None] < count, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    if ROTATE:
        table = keys[None, :] * (D // 2) + tl.arange(0, D // 2)[:, None]  # [D/2, BLOCK]
        if MASKED:
            cos = tl.load(COS + table, mask=keys[None, :] < count, other=0.0)
            sin = tl.load(SIN + table, mask=keys[None, :] < count, other=0.0)
        else:
            cos = tl.load(COS + table)
            sin = tl.load(SIN + table)
        k = turned_columns(k.to(tl.float32), cos, sin, BLOCK, D).to(q.dtype)
    scores = tl.dot(q, k, input_precision=PRECISION)  # [BLOCK_M, BLOCK]
    if MASKED:
        scores = tl.where(keys[None, :] < count, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, total, higher


@triton.jit(do_not_specialize=["tokens", "longest"])
def forward_kernel(
    QKV, COS, SIN, CU_SEQLENS, OUT, LSE,
    tokens, longest, heads, stride_image, stride_token, stride_part, stride_head, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    PACKED: tl.constexpr, ROTATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`scale` holds log2(e), so that exp2 serves; TAIL keys are masked at the end, 0 for none."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks  # queries of one head are neighbours: they share its keys in the cache
    head = tl.program_id(0) // blocks % heads
    image = tl.program_id(0) // blocks // heads
    count, first, offset, table = sequence(CU_SEQLENS, image, tokens, stride_image, stride_token, PACKED)
    if block * BLOCK_M >= count:
        return
    QKV += offset + head.to(tl.int64) * stride_head
    if ROTATE:
        COS += table * (D // 2)
        SIN += table * (D // 2)

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, D)
    inside = rows[:, None] < count
    q = tl.load(QKV + rows[:, None] * stride_token + channels[None, :], mask=inside, other=0.0)
    if ROTATE:
        at = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(COS + at, mask=inside, other=0.0)
        sin = tl.load(SIN + at, mask=inside, other=0.0)
        q = turned_rows(q.to(tl.float32), cos, sin, BLOCK_M, D).to(q.dtype)

    out = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    full = count // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        out, total, top = _step(
            out, total, top, q, QKV, COS, SIN, keys, count, stride_token, stride_part, scale,
            BLOCK_N, D, ROTATE, PRECISION, False,
        )  # fmt: skip
    if TAIL > 0:  # noqa: SIM102 - this is decided when the kernel is compiled, the next when it runs
        if full < count:
            keys = full + tl.arange(0, TAIL)
            out, total, top = _step(
                out, total, top, q, QKV, COS, SIN, keys, count, stride_token, stride_part, scale,
                TAIL, D, ROTATE, PRECISION, True,
            )  # fmt: skip

    OUT += first * heads * D + head * D
    tl.store(OUT + rows[:, None] * (heads * D) + channels[None, :], (out / total[:, None]).to(q.dtype), mask=inside)
    LSE += head * tokens + first if PACKED else (image * heads + head).to(tl.int64) * tokens
    tl.store(LSE + rows, top + tl.log2(total), mask=rows < count)


def forward(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]; any strides but that of D, which is 1
    cos: Tensor | None,  # [N or T, D/2] float32, or float16 for qkv of 16 bits; None: no rotation
    sin: Tensor | None,  # [N or T, D/2], likewise
    cu_seqlens: Tensor | None,  # [S + 1] int32; None: fixed input
    max_seqlen: int,
    scale: float,
    *,
    config: Config | None = None,  # of the table, unless given
) -> tuple[Tensor, Tensor]:
    """Attention, [B, N, H*D] or [T, H*D], and log2 of each query's sum of weights, float32 [B, H, N] or [H, T].

    Raises: ValueError for shapes, dtypes and widths that the kernel is not made for.
    """
    qkv, shape = near(qkv, check(qkv, cos, sin, cu_seqlens, max_seqlen, scale))
    out = qkv.new_empty((*shape.lead, shape.heads * shape.width))
    lse = qkv.new_empty((*shape.lead[:-1], shape.heads, shape.tokens), dtype=torch.float32)
    heads = shape.images * shape.heads

    def run(config: Config) -> None:
        if config.whole:
            keys, middle, rest = segments(shape.tokens)
            launch(
                short_kernel, heads, config,
                qkv, cos, sin, out, lse, shape.tokens, shape.heads, *shape.strides, scale * LOG2_E,
                D=shape.width, BLOCK_M=config.block_m, KEYS=keys, MIDDLE=middle, TAIL=rest,
            )  # fmt: skip
            return
        launch(
            forward_kernel, triton.cdiv(shape.longest, config.block_m) * heads, config,
            qkv, cos, sin, cu_seqlens, out, lse,
            shape.tokens, shape.longest, shape.heads, *shape.strides, scale * LOG2_E,
            D=shape.width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=tail(shape, config.block_n),
            PACKED=shape.packed, ROTATE=cos is not None, PRECISION=precision(qkv),
        )  # fmt: skip

    if out.numel():
        whole = None if shape.packed or cos is None else whole_heads(qkv, shape.tokens, heads)
        rotated = cos is not None
        run(config or select("forward", qkv, shape.length, run, packed=shape.packed, rotated=rotated, whole=whole))
    return out, lse
