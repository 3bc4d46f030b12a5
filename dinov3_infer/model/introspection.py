"""What one block makes of its tokens: queries, keys, values, and rows of its attention matrix."""

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
    """The projection that a block makes of the stream [B, N, C] that enters it, [B, N, 3, H, D], not rotated."""
    block: Any = model.blocks[number]
    x = entering(block.norm1(stream), block.attn.qkv)
    return block.attn.qkv(x).unflatten(-1, (3, model.num_heads, -1))  # type: ignore[no-any-return]


def with_facet(model: VisionTransformer, pixels: Tensor, blocks: Sequence[int], facet: Facet) -> BackboneOutput:
    """The output of a model whose layers are queries, keys or values: heads side by side, [B, *, C], not rotated."""
    last, before = model.run_blocks(pixels, indices=[block - 1 for block in blocks])
    layers = (_qkv(model, before[block - 1], block)[:, :, _THIRD[facet]].flatten(2) for block in blocks)
    return BackboneOutput(*model.split(model.normed(last)), tuple(LayerOutput(*model.split(x)) for x in layers))


def attention_rows(
    model: VisionTransformer,
    pixels: Tensor,  # [B, 3, H_px, W_px]
    block: int,  # from 0
    tokens: Tensor | None = None,  # [B] int64: the token of each image that asks; None: all of them
) -> Tensor:
    """How much a token attends to each token, softmax(q k^T / sqrt(D)), [B, H, 1 or N, N], float32 at least.

    With `tokens` the matrix is never built, so memory grows with N and not with its square.
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
