"""Attention for training on a CPU that keeps only its input.

The backward pass rotates q and k and computes the attention matrices again, a few images at a time, so that memory
never holds the matrices of all images.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..model.attention import rope_attention
from ..model.rope import apply_rope

__all__ = ["attend"]

_ENTRIES = 2**21  # entries of the attention matrices computed at a time; one image may exceed it


def attend(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32
    sin: Tensor | None,  # [N or T, D/2] float32
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention` with a backward pass that needs little memory on a CPU.

    On a CPU products have the dtype of qkv, and softmax is in float32 or float64.

    Returns:
        [B, N, H * D], or packed [T, H * D].
    """
    if qkv.device.type != "cpu":
        return rope_attention(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale)
    if cu_seqlens is not None:
        lengths = tuple(cu_seqlens.diff().tolist())
    else:
        lengths = (qkv.shape[1],) * len(qkv)
        cos, sin = (table if table is None else table.repeat(len(qkv), 1) for table in (cos, sin))
    tokens = qkv if cu_seqlens is not None else qkv.flatten(0, 1)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(tokens, cos, sin, lengths, scale)  # type: ignore[no-untyped-call]
    return out if cu_seqlens is not None else out.unflatten(0, qkv.shape[:2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        ctx.save_for_backward(qkv, cos, sin)
        ctx.lengths, ctx.scale = lengths, scale
        out = torch.empty_like(qkv[:, 0])
        for part, count in _parts(lengths, qkv.shape[-2]):
            q, k, v = _per_head(qkv[part], cos, sin, part, count)
            out[part] = _per_token(_weights(q, k, scale).to(v.dtype) @ v, count)
        return out.flatten(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With attention weights P and output gradient G: dV = P^T G, dS = softmax'(G V^T), dQ = dS K, dK = dS^T Q."""
        qkv, cos, sin = ctx.saved_tensors
        found = torch.empty_like(qkv)
        for part, count in _parts(ctx.lengths, qkv.shape[-2]):
            q, k, v = _per_head(qkv[part], cos, sin, part, count)
            g = _heads(gradient[part].unflatten(-1, qkv.shape[-2:]), count)
            p = _weights(q, k, ctx.scale)
            ds = torch._softmax_backward_data((g @ v.mT).to(p.dtype), p, -1, p.dtype).to(q.dtype)
            dqk = torch.stack([_per_token(t, count) for t in (ds @ k, ds.mT @ q)], dim=1).mul_(ctx.scale)
            found[part, :2] = _turned(dqk, cos, None if sin is None else -sin, part)
            found[part, 2] = _per_token(p.to(q.dtype).mT @ g, count)
        return found, None, None, None, None


def _parts(lengths: tuple[int, ...], heads: int) -> Iterator[tuple[slice, int]]:
    """Runs of consecutive images of one length: the slice of their tokens, and their number."""
    start = 0
    for length, run in groupby(lengths):
        left, most = sum(1 for _ in run), max(1, _ENTRIES // (heads * length**2))
        while left:
            count = min(left, most)
            yield slice(start, start + count * length), count
            start, left = start + count * length, left - count


def _per_head(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, part: slice, count: int) -> list[Tensor]:
    """[T, 3, H, D] -> rotated q, rotated k, and v, [count * H, N, D] each."""
    return [_heads(x, count) for x in (*_turned(qkv[:, :2], cos, sin, part).unbind(1), qkv[:, 2])]


def _turned(qk: Tensor, cos: Tensor | None, sin: Tensor | None, part: slice) -> Tensor:
    return qk if cos is None or sin is None else apply_rope(qk, cos[part, None], sin[part, None])


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return ((q * scale) @ k.mT).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))


def _heads(x: Tensor, count: int) -> Tensor:
    """[T, H, D] -> [count * H, N, D]."""
    images: Tensor = x.unflatten(0, (count, -1))
    return images.transpose(1, 2).flatten(0, 1)


def _per_token(x: Tensor, count: int) -> Tensor:
    """[count * H, N, D] -> [T, H, D]."""
    heads: Tensor = x.unflatten(0, (count, -1))
    return heads.transpose(1, 2).flatten(0, 1)
