"""Backward: gradients of q, k and v in one packed tensor, the rotation undone before they are stored.

Weights are recomputed from scores and their saved sums.  One kernel walks over queries for the gradients of k and v,
another over keys for that of q.  One program sums each element in a fixed order, so that two runs have equal bits.

Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ROTATION, Config, precision, select
from .launch import LOG2_E, check, launch, near
from .rotation import rotate
from .tiles import sequence, turned_rows

__all__ = ["backward", "delta_kernel", "key_value_kernel", "query_kernel"]


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    GRAD, OUT, DELTA, tokens, heads, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sum(grad * out) of each query, [B, H, N]."""
    blocks = tl.cdiv(tokens, BLOCK)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    image = (tl.program_id(0) // blocks // heads).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows[:, None] < tokens
    at = ((image * tokens + rows[:, None]) * heads + head) * D + tl.arange(0, D)[None, :]
    grad = tl.load(GRAD + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(OUT + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DELTA + (image * heads + head) * tokens + rows, tl.sum(grad * out, 1), mask=rows < tokens)


@triton.jit
def _store_gradient(DQKV, COS, SIN, part, x, rows, count, heads, dtype: tl.constexpr, TURN_BACK: tl.constexpr,
                    BLOCK: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """Stores [BLOCK, D] to its third of the packed gradient, rotated by the opposite angle."""
    inside = rows[:, None] < count
    if TURN_BACK:
        at = rows[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(COS + at, mask=inside, other=0.0)
        sin = tl.load(SIN + at, mask=inside, other=0.0)
        x = turned_rows(x, cos, -sin, BLOCK, D)
    at = (rows[:, None] * 3 + part) * heads * D + tl.arange(0, D)[None, :]
    tl.store(DQKV + at, x.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["tokens", "longest"])
def key_value_kernel(
    QK, V, COS, SIN, CU_SEQLENS, GRAD, LSE, DELTA, DQKV,
    tokens, longest, heads, qk_image, qk_token, qk_part, qk_head, v_image, v_token, v_head, scale, log_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys and their values and walks over the queries; score tiles are [BLOCK_N, BLOCK_M]."""
    blocks = tl.cdiv(longest, BLOCK_N)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    image = tl.program_id(0) // blocks // heads
    count, first, offset, table = sequence(CU_SEQLENS, image, tokens, qk_image, qk_token, PACKED)
    if block * BLOCK_N >= count:
        return
    QK += offset + head.to(tl.int64) * qk_head
    V += (first * v_token if PACKED else image.to(tl.int64) * v_image) + head.to(tl.int64) * v_head
    GRAD += first * heads * D + head * D
    sums = head * tokens + first if PACKED else (image * heads + head).to(tl.int64) * tokens
    LSE += sums
    DELTA += sums

    channels = tl.arange(0, D)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys[:, None] < count
    k = tl.load(QK + qk_part + keys[:, None] * qk_token + channels[None, :], mask=inside, other=0.0)
    v = tl.load(V + keys[:, None] * v_token + channels[None, :], mask=inside, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for start in range(0, count, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = tl.load(QK + rows[None, :] * qk_token + channels[:, None], mask=rows[None, :] < count, other=0.0)
        grad = tl.load(GRAD + rows[:, None] * heads * D + channels[None, :], mask=rows[:, None] < count, other=0.0)
        lse = tl.load(LSE + rows, mask=rows < count, other=0.0)
        delta = tl.load(DELTA + rows, mask=rows < count, other=0.0)
        weights = tl.exp2(tl.dot(k, q, input_precision=PRECISION) * log_scale - lse[None, :])  # [BLOCK_N, BLOCK_M]
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, tl.trans(q), dk, input_precision=PRECISION)
    DQKV += first * 3 * heads * D + head * D
    if ROTATE:
        COS += table * (D // 2)
        SIN += table * (D // 2)
    _store_gradient(DQKV, COS, SIN, 1, dk * scale, keys, count, heads, k.dtype, ROTATE, BLOCK_N, D)
    _store_gradient(DQKV, COS, SIN, 2, dv, keys, count, heads, k.dtype, False, BLOCK_N, D)


@triton.jit(do_not_specialize=["tokens", "longest"])
def query_kernel(
    QK, V, COS, SIN, CU_SEQLENS, GRAD, LSE, DELTA, DQKV,
    tokens, longest, heads, qk_image, qk_token, qk_part, qk_head, v_image, v_token, v_head, scale, log_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACKED: tl.constexpr, ROTATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries and walks over the keys."""
    blocks = tl.cdiv(longest, BLOCK_M)
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    image = tl.program_id(0) // blocks // heads
    count, first, offset, table = sequence(CU_SEQLENS, image, tokens, qk_image, qk_token, PACKED)
    if block * BLOCK_M >= count:
        return
    QK += offset + head.to(tl.int64) * qk_head
    V += (first * v_token if PACKED else image.to(tl.int64) * v_image) + head.to(tl.int64) * v_head
    GRAD += first * heads * D + head * D
    sums = head * tokens + first if PACKED else (image * heads + head).to(tl.int64) * tokens

    channels = tl.arange(0, D)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows[:, None] < count
    q = tl.load(QK + rows[:, None] * qk_token + channels[None, :], mask=inside, other=0.0)
    grad = tl.load(GRAD + rows[:, None] * heads * D + channels[None, :], mask=inside, other=0.0)
    lse = tl.load(LSE + sums + rows, mask=rows < count, other=0.0)
    delta = tl.load(DELTA + sums + rows, mask=rows < count, other=0.0)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, count, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        valid = keys[None, :] < count
        k = tl.load(QK + qk_part + keys[None, :] * qk_token + channels[:, None], mask=valid, other=0.0)
        v = tl.load(V + keys[None, :] * v_token + channels[:, None], mask=valid, other=0.0)
        weights = tl.exp2(tl.dot(q, k, input_precision=PRECISION) * log_scale - lse[:, None])
        weights = tl.where(valid, weights, 0.0)  # a key past the end would weigh 2^-lse, which can be infinite
        dweights = tl.dot(grad, v, input_precision=PRECISION)
        dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
        dq = tl.dot(dscores, tl.trans(k), dq, input_precision=PRECISION)
    DQKV += first * 3 * heads * D + head * D
    if ROTATE:
        COS += table * (D // 2)
        SIN += table * (D // 2)
    _store_gradient(DQKV, COS, SIN, 0, dq * scale, rows, count, heads, q.dtype, ROTATE, BLOCK_M, D)


def backward(
    grad: Tensor,  # [B, N, H*D] or [T, H*D]
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32, or float16 for qkv of 16 bits; None: no rotation
    sin: Tensor | None,  # [N or T, D/2], likewise
    cu_seqlens: Tensor | None,  # [S + 1] int32; None: fixed input
    max_seqlen: int,
    scale: float,
    out: Tensor,  # what `forward` returned
    lse: Tensor,
    *,
    key_value_config: Config | None = None,  # of the table, unless given
    query_config: Config | None = None,
) -> Tensor:
    """The gradient of qkv in its shape, contiguous.  Rotated q and k exist only while this runs.

    Raises: ValueError for shapes, dtypes and widths that the kernel is not made for.
    """
    qkv, shape = near(qkv, check(qkv, cos, sin, cu_seqlens, max_seqlen, scale))
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if not dqkv.numel():
        return dqkv
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    leading = shape.rows // shape.tokens  # B, or 1 for packed images: their rows are one run
    programs = triton.cdiv(shape.tokens, ROTATION.block_m) * leading * shape.heads
    launch(
        delta_kernel, programs, ROTATION, grad, out, delta, shape.tokens, shape.heads,
        D=shape.width, BLOCK=ROTATION.block_m,
    )  # fmt: skip
    qk = qkv if cos is None or sin is None else rotate(qkv, cos, sin)
    qk_strides = check(qk, parts=qk.shape[-3]).strides
    v_strides = (shape.strides[0], shape.strides[1], shape.strides[3])
    v = qkv.select(-3, 2)

    def run(kernel: object, block: int, config: Config) -> None:
        launch(
            kernel, triton.cdiv(shape.longest, block) * shape.images * shape.heads, config,
            qk, v, cos, sin, cu_seqlens, grad, lse, delta, dqkv,
            shape.tokens, shape.longest, shape.heads, *qk_strides, *v_strides, scale, scale * LOG2_E,
            D=shape.width, BLOCK_M=config.block_m, BLOCK_N=config.block_n, PACKED=shape.packed, ROTATE=cos is not None,
            PRECISION=precision(qkv),
        )  # fmt: skip

    def key_values(config: Config) -> None:
        run(key_value_kernel, config.block_n, config)

    def queries(config: Config) -> None:
        run(query_kernel, config.block_m, config)

    form: Any = dict(packed=shape.packed, rotated=cos is not None)
    key_values(key_value_config or select("key_value", qkv, shape.length, key_values, **form))
    queries(query_config or select("query", qkv, shape.length, queries, **form))
    return dqkv
