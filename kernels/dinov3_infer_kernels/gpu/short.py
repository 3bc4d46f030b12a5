"""Forward for images of a few hundred tokens: one program per head, which reads and rotates each key once.

Keys and values of a head stay in shared memory while the program walks over the queries.  All scores of a query are
computed before its softmax, which needs no running maximum.  The kernel reads a third of what that of `forward` reads.
It is used where there are at least as many heads as multiprocessors.
"""

import triton
import triton.language as tl

from .tiles import turned_columns, turned_rows

__all__ = ["segments", "short_kernel"]


@triton.jit
def _keys(
    QKV, COS, SIN, first, tokens, stride_token, stride_part,
    COUNT: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rotated keys [D, COUNT] and values [COUNT, D]."""
    key = first + tl.arange(0, COUNT)
    channels = tl.arange(0, D)
    k_at = QKV + stride_part + key[None, :] * stride_token + channels[:, None]
    v_at = QKV + 2 * stride_part.to(tl.int64) + key[:, None] * stride_token + channels[None, :]
    table = key[None, :] * (D // 2) + tl.arange(0, D // 2)[:, None]
    if MASKED:
        inside = key[None, :] < tokens
        k = tl.load(k_at, mask=inside, other=0.0)
        v = tl.load(v_at, mask=key[:, None] < tokens, other=0.0)
        cos = tl.load(COS + table, mask=inside, other=0.0)
        sin = tl.load(SIN + table, mask=inside, other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
        cos = tl.load(COS + table)
        sin = tl.load(SIN + table)
    return turned_columns(k.to(tl.float32), cos, sin, COUNT, D).to(v.dtype), v


@triton.jit(do_not_specialize=["tokens"])
def short_kernel(
    QKV, COS, SIN, OUT, LSE, tokens, heads, stride_image, stride_token, stride_part, stride_head, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, KEYS: tl.constexpr, MIDDLE: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """The keys are split into KEYS, MIDDLE and TAIL, of which the last are masked; `scale` includes log2(e)."""
    head = tl.program_id(0) % heads
    image = (tl.program_id(0) // heads).to(tl.int64)
    QKV += image * stride_image + head.to(tl.int64) * stride_head
    OUT += image * tokens * heads * D + head * D
    LSE += (image * heads + head) * tokens
    k, v = _keys(QKV, COS, SIN, 0, tokens, stride_token, stride_part, KEYS, D, False)
    if MIDDLE > 0:
        k_middle, v_middle = _keys(QKV, COS, SIN, KEYS, tokens, stride_token, stride_part, MIDDLE, D, False)
    if TAIL > 0:
        k_tail, v_tail = _keys(QKV, COS, SIN, KEYS + MIDDLE, tokens, stride_token, stride_part, TAIL, D, True)
    channels = tl.arange(0, D)
    pairs = tl.arange(0, D // 2)
    for start in tl.range(0, tokens, BLOCK_M, num_stages=1):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows[:, None] < tokens
        q = tl.load(QKV + rows[:, None] * stride_token + channels[None, :], mask=inside, other=0.0)
        cos = tl.load(COS + rows[:, None] * (D // 2) + pairs[None, :], mask=inside, other=0.0)
        sin = tl.load(SIN + rows[:, None] * (D // 2) + pairs[None, :], mask=inside, other=0.0)
        q = turned_rows(q.to(tl.float32), cos, sin, BLOCK_M, D).to(v.dtype)
        scores = tl.dot(q, k)
        top = tl.max(scores, 1)
        if MIDDLE > 0:
            scores_middle = tl.dot(q, k_middle)
            top = tl.maximum(top, tl.max(scores_middle, 1))
        if TAIL > 0:
            scores_tail = tl.dot(q, k_tail)
            valid = KEYS + MIDDLE + tl.arange(0, TAIL)[None, :] < tokens
            scores_tail = tl.where(valid, scores_tail, float("-inf"))
            top = tl.maximum(top, tl.max(scores_tail, 1))
        top *= scale
        weights = tl.exp2(scores * scale - top[:, None])
        total = tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v)
        if MIDDLE > 0:
            weights = tl.exp2(scores_middle * scale - top[:, None])
            total += tl.sum(weights, 1)
            out = tl.dot(weights.to(v.dtype), v_middle, out)
        if TAIL > 0:
            weights = tl.exp2(scores_tail * scale - top[:, None])
            total += tl.sum(weights, 1)
            out = tl.dot(weights.to(v.dtype), v_tail, out)
        at = rows[:, None] * (heads * D) + channels[None, :]
        tl.store(OUT + at, (out / total[:, None]).to(v.dtype), mask=inside)
        tl.store(LSE + rows, top + tl.log2(total), mask=rows < tokens)


def segments(tokens: int) -> tuple[int, int, int]:
    """Keys of each part: a power of two, 64 more if there are as many, and the power of two that covers the rest."""
    keys = 1 << (tokens.bit_length() - 1)
    middle = 64 if 64 <= tokens - keys < keys and keys > 64 else 0
    rest = tokens - keys - middle
    return keys, middle, max(16, triton.next_power_of_2(rest)) if rest else 0
