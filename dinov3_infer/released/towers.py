"""The two towers of dino.txt: a text transformer, and blocks on the tokens of a backbone.

Source: dino.txt (arXiv 2412.16334); dinov3/eval/text at 6876159.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone
from ..errors import InputError
from ..model.layers import Attention, Block, GatedMlp, LayerNorm, Mlp, ViTConfig, project, widened

__all__ = ["TextTower", "VisionHead", "VisualTower"]


class _SwiGlu(GatedMlp):
    """w3(silu(w1 x) * w2 x), under Meta's names."""

    def __init__(self, width: int, hidden: int) -> None:
        nn.Module.__init__(self)
        self.w1, self.w2, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return project(self.w3, self.activate(torch.cat((project(self.w1, x), project(self.w2, x)), dim=-1)))


class VisionHead(nn.Module):
    """Two blocks without positions, and a norm: tokens of a backbone to tokens that texts are compared with."""

    def __init__(self, width: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        hidden = -(-(width * 8 // 3) // 64) * 64
        config = ViTConfig(width, depth, heads, hidden, gated=True, qkv_bias=False, position_grid=1)
        blocks = [Block(config) for _ in range(depth)]
        for block in blocks:
            block.mlp = _SwiGlu(width, hidden)
            for gamma in (block.ls1.gamma, block.ls2.gamma):
                nn.init.constant_(gamma, 1e-5)  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = LayerNorm(width, config.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] after the final norm of the backbone -> [B, N, C]."""
        for block in self.blocks:
            tokens = block(tokens, None)
        return self.ln_final(tokens)  # type: ignore[no-any-return]


class VisualTower(nn.Module):
    """A backbone with the head on it; the backbone is no part of this module, since the module above has it."""

    backbone: Backbone

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.head = VisionHead(backbone.embed_dim, backbone.config.num_heads)
        self.__dict__["backbone"] = backbone

    def tokens(self, output: Any) -> tuple[Tensor, Tensor]:
        """What a backbone gives -> class token [B, C] and patches [B, P, C] in the space of texts."""
        found: Tensor = self.head(output.last_hidden_state)
        return found[:, 0], found[:, found.shape[1] - output.patch_tokens.shape[1] :]

    def get_class_and_patch_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Meta's, of DINOv3: as `tokens` for normalised pixels [B, 3, H_px, W_px], and the backbone's own patches."""
        output = self.backbone(pixels)
        return (*self.tokens(output), output.patch_tokens)


def _causal(qkv: Tensor, cos: None, sin: None, **_: Any) -> Tensor:
    """Each token [B, N, 3, H, D] sees itself and those before it -> [B, N, H * D]."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    found: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return found.transpose(1, 2).flatten(2)


class _TextBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.attention = Attention(config)
        self.attention.attend = _causal
        self.ffn_norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.feed_forward = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), None).to(x.dtype)
        x = x + self.feed_forward(self.ffn_norm(x)).to(x.dtype)
        return x


class _TextTransformer(nn.Module):
    def __init__(self, config: ViTConfig, context: int, vocabulary: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.embed_dim)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, config.embed_dim))
        self.blocks = nn.ModuleList(_TextBlock(config) for _ in range(config.depth))
        self.ln_final = LayerNorm(config.embed_dim, config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, N, width]."""
        context, count = len(self.positional_embedding), ids.shape[-1]
        if ids.ndim != 2 or not 1 <= count <= context or ids.is_floating_point():
            raise InputError(
                f"ids are whole numbers [B, N], N from 1 to {context}, got {ids.dtype} {list(ids.shape)}; "
                "the tokenizer gives them"
            )
        x = widened(self.token_embedding(ids) + self.positional_embedding[:count])
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)  # type: ignore[no-any-return]


class TextTower(nn.Module):
    """Ids of texts to vectors: the token of the largest id, which is the first end, through one product."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        outputs: int,  # numbers of a vector
        context: int = 77,  # ids of a text at most
        vocabulary: int = 49408,
    ) -> None:
        super().__init__()
        config = ViTConfig(width, depth, heads, 4 * width, qkv_bias=False, position_grid=1)
        self.backbone = _TextTransformer(config, context, vocabulary)
        self.head = nn.ModuleDict({"linear_projection": nn.Linear(width, outputs, bias=False)})

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, outputs], float32 at least."""
        tokens = self.backbone(ids)
        rows = torch.arange(len(ids), device=ids.device)
        return widened(project(self.head["linear_projection"], tokens[rows, ids.argmax(dim=-1)]))
