"""Queries, keys, values and rows of the attention matrix of a block."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .layers import entering
from .network import BackboneOutput, LayerOutput
from .rope import apply_rope
from .vit import VisionTransformer

__all__ = ["Facet", "attention_rows", "with_facet"]

Facet = Literal["token", "query", "key", "value"]
_THIRD = {"query": 0, "key": 1, "value": 2}


def _qkv(model: VisionTransformer, stream: Tensor, number: int) -> Tensor:
    """The qkv projection of the stream [B, N, C] that enters a block, [B, N, 3, H, D], before RoPE."""
    block: Any = model.blocks[number]
    x = entering(block.norm1(stream), block.attn.qkv)
    return block.attn.qkv(x).unflatten(-1, (3, model.num_heads, -1))  # type: ignore[no-any-return]


def with_facet(model: VisionTransformer, pixels: Tensor, blocks: Sequence[int], facet: Facet) -> BackboneOutput:
    """The output of a model whose layers are queries, keys or values, concatenated over heads, before RoPE.

    Args:
        pixels: [B, 3, H_px, W_px], normalised.
        blocks: Block numbers from 0.
        facet: "query", "key" or "value"; the layers have cls_token [B, C], registers [B, R, C] and patches [B, P, C].
    """
    last, before = model.run_blocks(pixels, indices=[block - 1 for block in blocks])
    layers = (_qkv(model, before[block - 1], block)[:, :, _THIRD[facet]].flatten(2) for block in blocks)
    return BackboneOutput(*model.split(model.normed(last)), tuple(LayerOutput(*model.split(x)) for x in layers))


def attention_rows(
    model: VisionTransformer,
    pixels: Tensor,  # [B, 3, H_px, W_px]
    block: int,  # from 0
    tokens: Tensor | None = None,  # [B] int64: the query token of each image; None: all tokens
) -> Tensor:
    """Attention weights softmax(q k^T / sqrt(D)), [B, H, 1 or N, N], in float32 at least.

    With `tokens` the whole matrix is never built, so that memory grows with N and not with its square.
    """
    _, taken = model.run_blocks(pixels, indices=[block - 1], stop_early=True)
    qkv = _qkv(model, taken[block - 1], block)
    q, k = qkv[:, :, 0], qkv[:, :, 1]  # [B, N, H, D]
    table = model.rope(model.grid_of(pixels))
    if table is not None:
        q, k = apply_rope(q, *table), apply_rope(k, *table)
    if tokens is not None:
        q = q[torch.arange(len(q), device=q.device), tokens.to(q.device)][:, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("bqhd,bnhd->bhqn", q.to(wide) * q.shape[-1] ** -0.5, k.to(wide)).softmax(dim=-1)
