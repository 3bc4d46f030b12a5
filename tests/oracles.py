"""Models of transformers and timm with every parameter random, and how far ours is from them."""

from typing import Any

import torch
from torch import Tensor, nn

from dinov3_infer.vit import BackboneOutput, ViTConfig

# A small config of each family: what a test takes when width and depth do not matter.
SMALL: dict[str, ViTConfig] = {
    "dinov3": ViTConfig(64, 2, 4, 128),
    "dinov3_gated": ViTConfig(64, 2, 4, 96, gated=True),
    "dinov3_no_bias": ViTConfig(64, 2, 2, 96, gated=True, qkv_bias=False),
    "dinov2": ViTConfig(
        64, 2, 4, 256, patch_size=14, num_registers=0, position_grid=5, position_resize="size", key_bias=True, norm_eps=1e-6
    ),
    "dinov2_reg": ViTConfig(64, 2, 4, 256, patch_size=14, position_grid=5, key_bias=True, norm_eps=1e-6),
    "dinov2_gated": ViTConfig(
        64, 2, 4, 176, gated=True, patch_size=14, num_registers=0, position_grid=5, position_resize="size", key_bias=True,
        norm_eps=1e-6,
    ),
    "dino": ViTConfig(
        64, 2, 4, 256, patch_size=8, num_registers=0, position_grid=5, position_resize="size", key_bias=True, norm_eps=1e-12,
        layerscale=False, mask_token=False,
    ),
}  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter live, none at its initial value: a term that is left out or doubled shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                value = 1.0 + 0.2 * noise
            elif "gamma" in name or "lambda" in name:
                value = 0.3 + 0.1 * noise
            elif parameter.ndim >= 2 and "token" not in name and "pos" not in name:
                value = noise * (parameter[0].numel() ** -0.5)
            else:
                value = 0.2 * noise
            parameter.copy_(value)
    return module.eval()


def hf_model(config: ViTConfig, seed: int = 0) -> nn.Module:
    """transformers' model of the same architecture, from its own config class, with random parameters."""
    import transformers as t

    common: dict[str, Any] = dict(
        hidden_size=config.embed_dim, num_hidden_layers=config.depth, num_attention_heads=config.num_heads,
        patch_size=config.patch_size, layer_norm_eps=config.norm_eps,
    )  # fmt: skip
    if config.position_grid is None:
        made = t.DINOv3ViTModel(
            t.DINOv3ViTConfig(
                **common, image_size=224, intermediate_size=config.ffn_dim, num_register_tokens=config.num_registers,
                use_gated_mlp=config.gated, hidden_act="silu" if config.gated else "gelu", rope_theta=config.rope_base,
                query_bias=config.qkv_bias, key_bias=config.qkv_bias and config.key_bias, value_bias=config.qkv_bias,
            )
        )  # fmt: skip
        return randomise(made, seed)
    common["image_size"] = config.position_grid * config.patch_size
    if not config.layerscale:
        return randomise(t.ViTModel(t.ViTConfig(**common, intermediate_size=config.ffn_dim), add_pooling_layer=False), seed)
    common |= dict(mlp_ratio=4, use_swiglu_ffn=config.gated)
    if config.num_registers:
        made = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**common, num_register_tokens=config.num_registers))
    else:
        made = t.Dinov2Model(t.Dinov2Config(**common))
    return randomise(made, seed)


def hf_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    """Class token, registers and patches after the final norm, [B, N, C]."""
    extra = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    return model(pixels, **extra).last_hidden_state  # type: ignore[no-any-return]


def tokens(output: BackboneOutput) -> Tensor:
    """All tokens of ours in the order of everyone, [B, N, C]."""
    return torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), dim=1)


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def worst_token(a: Tensor, b: Tensor) -> float:
    """The largest relative L2 distance of any single token, [..., C] each."""
    a, b = a.detach().double(), b.detach().double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())
