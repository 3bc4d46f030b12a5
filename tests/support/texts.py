"""dino.txt to test with: odd strings, a small model under the real names, and its two towers as others write them."""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dinov3_infer.released import catalogue
from dinov3_infer.released.catalogue import HEADS, HeadInfo
from dinov3_infer.released.towers import TextTower, VisionHead

SMALL = "dinov3_nano_dinotxt"
SPLIT = "dinov2_nano_dinotxt"  # in two files, as DINOv2's

_WORDS = """
a photo of the dog's, they're I'VE we'll 'd 's 'S 'ſ don't naïve façade Straße ĳ ﬁ ﬀ ½ Ⅷ ² 1234 १२३ 3.14
日本語 東京タワー 한국어 ไทย العربية עברית Ελληνικά Σίσυφος кошка 😀 👩‍👩‍👧 🇩🇪 é e\u0301 ñ Å K Ω µ … — “quoted”
‘single’ « » &amp; &amp;amp; &lt;b&gt; &#39; &#x1F600; &eacute; &nbsp; schÃ¶n Ã© donâ€™t â€œx â€\x9d ï»¿
<start_of_text> <end_of_text> <END_of_text> <|endoftext|> </w> Ġ _ __ @#$%^&*() ~` |\\ // $5.00 50% #tag
http://x.org/?a=1&b=2 a@b.c C++ C# .NET tupperware antidisestablishmentarianism xxxxxxxxxxxxxxxx 00000000
!!!! ??? ﷺ ǆ ΐ İ ı ﬄ ﾊﾟ ｆｕｌｌ ① ℡
"""
_CONTROLS = "\ud800 \udc00 \ufffd \ufeff \u200b \u200d \x00 \x07 \x1b[31m \x7f \u180e \u202e \u2060"
_PARTS = (*re.split("[ \n]+", _WORDS.strip()), *re.split(" ", _CONTROLS))
_SPACES = ("", " ", "  ", "\t", "\n", "\r\n", "\xa0", "\u3000", "\u2003", "\x1d", "\u2029")


def odd_strings(count: int, seed: int = 0) -> list[str]:
    """Different texts of words in many writings, mojibake, entities, controls and code points by chance."""
    draw = random.Random(seed)

    def piece() -> str:
        kind = draw.random()
        if kind < 0.6:
            found = draw.choice(_PARTS)
            return draw.choice((found, found.upper(), found.title())) if draw.random() < 0.2 else found
        if kind < 0.75:
            return "".join(chr(draw.randrange(32, 127)) for _ in range(draw.randrange(1, 9)))
        if kind < 0.9:
            return "".join(chr(draw.randrange(0x3000)) for _ in range(draw.randrange(1, 5)))
        if kind < 0.98:
            return chr(draw.randrange(0x110000))
        return draw.choice(_PARTS) * draw.randrange(2, 40)

    found: dict[str, None] = {"": None}
    while len(found) < count:
        found["".join(piece() + draw.choice(_SPACES) for _ in range(draw.randrange(1, 9)))] = None
    return list(found)


@contextmanager
def small_heads() -> Iterator[None]:
    """Two rows more: dino.txt on nano, with the real vocabulary and images of 64 pixels."""
    options: dict[str, Any] = dict(
        text=dict(width=32, heads=4, depth=2), transform=dict(size=64, fit="crop", filter="bicubic", engine="pil")
    )
    rows = (
        HeadInfo(SMALL, "text", "nano", "none", "both.pth", options=options | dict(is_v3=True)),
        HeadInfo(SPLIT, "text", "nano", "none", "a.pth", options=options | dict(is_v3=False), more=("b.pth",)),
    )
    with mock.patch.object(catalogue, "HEADS", (*HEADS, *rows)):
        yield


def as_meta(state: dict[str, Tensor], split: bool = False) -> list[dict[str, Tensor]]:
    """Tensors of a head as the owner's files have them: one of DINOv3, two of DINOv2."""
    if not split:
        return [dict(state)]
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in state.items():
        if name.startswith("visual_model.head."):
            parts[0][name.removeprefix("visual_model.head.").replace("blocks.", "block_list.")] = tensor
        elif name.startswith("text_model."):
            parts[1][name.removeprefix("text_model.")] = tensor
    return parts


def clip_tower(tower: TextTower) -> nn.Module:
    """transformers' CLIP text model with the same weights; its projection is part of it."""
    import transformers as t

    weights = tower.state_dict()
    vocabulary, width = weights["backbone.token_embedding.weight"].shape
    config = t.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, hidden_act="gelu", layer_norm_eps=1e-5,
        num_hidden_layers=len(tower.backbone.blocks), num_attention_heads=tower.backbone.blocks[0].attention.num_heads,
        max_position_embeddings=len(weights["backbone.positional_embedding"]), eos_token_id=vocabulary - 1,
        projection_dim=len(weights["head.linear_projection.weight"]),
    )  # fmt: skip
    model = t.CLIPTextModelWithProjection(config).to(weights["backbone.positional_embedding"].dtype).eval()
    names = {
        "text_projection.weight": "head.linear_projection.weight",
        "text_model.embeddings.token_embedding.weight": "backbone.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "backbone.positional_embedding",
        "text_model.final_layer_norm.weight": "backbone.ln_final.weight",
        "text_model.final_layer_norm.bias": "backbone.ln_final.bias",
    }
    parts = {"self_attn.out_proj": "attention.proj", "layer_norm1": "attention_norm", "layer_norm2": "ffn_norm",
             "mlp.fc1": "feed_forward.fc1", "mlp.fc2": "feed_forward.fc2"}  # fmt: skip
    found = {theirs: weights[ours] for theirs, ours in names.items()}
    for i in range(config.num_hidden_layers):
        block, layer = f"backbone.blocks.{i}", f"text_model.encoder.layers.{i}"
        for name, third in zip("qkv", weights[f"{block}.attention.qkv.weight"].chunk(3), strict=True):
            found[f"{layer}.self_attn.{name}_proj.weight"] = third
            found[f"{layer}.self_attn.{name}_proj.bias"] = torch.zeros(width, dtype=third.dtype)
        for theirs, ours in parts.items():
            found |= {f"{layer}.{theirs}.{end}": weights[f"{block}.{ours}.{end}"] for end in ("weight", "bias")}
    model.load_state_dict(found, strict=True)
    return model


def clip_vectors(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).text_embeds  # type: ignore[no-any-return]


def dinov3_layers(head: VisionHead) -> Callable[[Tensor], Tensor]:
    """The vision head as transformers' layers of DINOv3 that do not rotate, and torch's norm."""
    import transformers as t
    from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

    weights = head.state_dict()
    width, hidden = weights["ln_final.weight"].shape[0], weights["blocks.0.mlp.w1.weight"].shape[0]
    config = t.DINOv3ViTConfig(
        hidden_size=width, num_attention_heads=head.blocks[0].attn.num_heads, intermediate_size=hidden,
        hidden_act="silu", use_gated_mlp=True, query_bias=False, key_bias=False, value_bias=False, layer_norm_eps=1e-5,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    names = {"norm1": "norm1", "norm2": "norm2", "attention.o_proj": "attn.proj", "mlp.gate_proj": "mlp.w1",
             "mlp.up_proj": "mlp.w2", "mlp.down_proj": "mlp.w3"}  # fmt: skip
    layers = []
    for i in range(len(head.blocks)):
        found = {f"layer_scale{j}.lambda1": weights[f"blocks.{i}.ls{j}.gamma"] for j in (1, 2)}
        for name, third in zip("qkv", weights[f"blocks.{i}.attn.qkv.weight"].chunk(3), strict=True):
            found[f"attention.{name}_proj.weight"] = third
        for theirs, ours in names.items():
            found |= {f"{theirs}.{end}": weights[f"blocks.{i}.{ours}.{end}"] for end in ("weight", "bias")}
        layer = DINOv3ViTLayer(config).to(weights["ln_final.weight"].dtype).eval()
        layer.load_state_dict(found, strict=True)
        layers.append(layer)

    def forward(tokens: Tensor) -> Tensor:
        ones = tokens.new_ones(tokens.shape[1], width // config.num_attention_heads)
        for layer in layers:
            found = layer(tokens, position_embeddings=(ones, torch.zeros_like(ones)))
            tokens = found if isinstance(found, Tensor) else found[0]
        return nn.functional.layer_norm(tokens, (width,), weights["ln_final.weight"], weights["ln_final.bias"], 1e-5)

    return forward
