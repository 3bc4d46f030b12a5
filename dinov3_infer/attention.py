"""Attention over the packed qkv projection, rotated on the way: the torch definition.

One signature for pictures of one size (`[B, N, 3, H, D]`) and for pictures of many sizes laid end to end
(`[T, 3, H, D]` with `cu_seqlens`).  This is product code: the CPU path, and what a kernel is judged by.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .errors import InputError, UnsupportedError
from .rope import apply_rope

__all__ = ["IMPLEMENTATIONS", "eager_attention", "resolve_attention", "rope_attention"]

# q, k, v [B, H, N, D] and the softmax scale -> [B, H, N, D]
Core = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=scale)


def _eager(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Softmax in float32 at least, the whole matrix in memory: to look at, or to differentiate twice."""
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def rope_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32, identity rows for class and register tokens; None: no rotation
    sin: Tensor | None,  # [N or T, D/2] float32
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32, the first token of each sequence and T; packed input only
    max_seqlen: int | None = None,
    scale: float | None = None,
    core: Core = _sdpa,
) -> Tensor:
    """Softmax attention of rotated q and k, [B, N, H*D], or [T, H*D] for packed input.

    Queries and keys are turned by the angles of their token, values are not.  `scale` defaults to D^-0.5.
    `max_seqlen` saves a kernel a look at `cu_seqlens`; this definition does not need it.

    Source: dinov3/layers/attention.py:19-38 and 114-135 at 6876159.
    """
    q, k, v = qkv.unbind(-3)
    if cos is not None and sin is not None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    if cu_seqlens is None:
        return _heads_apart(q, k, v, scale, core)
    lengths = cu_seqlens.diff().tolist()
    pieces, start = [], 0
    for length, run in groupby(lengths):  # neighbours of one length make a batch
        count = sum(1 for _ in run)
        batch = slice(start, start + count * length)
        part_q, part_k, part_v = (t[batch].unflatten(0, (count, length)) for t in (q, k, v))
        pieces.append(_heads_apart(part_q, part_k, part_v, scale, core).flatten(0, 1))
        start = batch.stop
    return torch.cat(pieces)


def _heads_apart(q: Tensor, k: Tensor, v: Tensor, scale: float | None, core: Core) -> Tensor:
    """[B, N, H, D] each -> [B, N, H*D]."""
    return core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale).transpose(1, 2).flatten(2)


def eager_attention(
    qkv: Tensor,  # [B, N, 3, H, D], or packed [T, 3, H, D]
    cos: Tensor | None,  # [N or T, D/2] float32
    sin: Tensor | None,  # [N or T, D/2] float32
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1] int32
    max_seqlen: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rope_attention` with the whole score matrix in memory and nothing but elementary operations."""
    return rope_attention(qkv, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, core=_eager)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "auto": rope_attention,
    "sdpa": rope_attention,
    "eager": eager_attention,
}


def resolve_attention(name: str) -> Callable[..., Tensor]:
    """The function behind `attn_implementation`."""
    if name == "triton":
        raise UnsupportedError(
            "attn_implementation='triton' is not in this version; use 'auto', which takes the fastest there is"
        )
    if name not in IMPLEMENTATIONS:
        raise InputError(f"attn_implementation is one of {', '.join(IMPLEMENTATIONS)}; got {name!r}")
    return IMPLEMENTATIONS[name]
