"""Models of transformers and timm with random parameters, and the distance of ours from them."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dinov3_infer import Backbone
from dinov3_infer.model.network import BackboneOutput, LayerOutput
from dinov3_infer.model.vit import ViTConfig

_V2: dict[str, Any] = dict(patch_size=14, position_grid=5, key_bias=True, norm_eps=1e-6)
_NO_REGISTERS: dict[str, Any] = dict(num_registers=0, position_resize="size")

# A small transformers config of each family, for tests in which width and depth do not matter.
SMALL: dict[str, ViTConfig] = {
    "dinov3": ViTConfig(64, 2, 4, 128),
    "dinov3_gated": ViTConfig(64, 2, 4, 96, gated=True),
    "dinov3_no_bias": ViTConfig(64, 2, 2, 96, gated=True, qkv_bias=False),
    "dinov2": ViTConfig(64, 2, 4, 256, **_V2, **_NO_REGISTERS),
    "dinov2_reg": ViTConfig(64, 2, 4, 256, **_V2),
    "dinov2_gated": ViTConfig(64, 2, 4, 176, gated=True, **_V2, **_NO_REGISTERS),
    "dino": ViTConfig(
        64, 2, 4, 256, patch_size=8, position_grid=5, key_bias=True, norm_eps=1e-12, layerscale=False, mask_token=False,
        **_NO_REGISTERS,
    ),
}  # fmt: skip

# RoPE periods of head width 64 and base 100, rounded to bfloat16 as in the released DINOv3 files
PUBLISHED_PERIODS = (
    1, 1.3359375, 1.78125, 2.375, 3.15625, 4.21875, 5.625, 7.5, 10, 13.3125, 17.75, 23.75, 31.625, 42.25, 56.25, 75
)  # fmt: skip


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Sets every parameter to random values, so that a missing or doubled term changes the result."""
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
    """A transformers model of the same architecture, from its config class, with random parameters."""
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
        return randomise(
            t.ViTModel(t.ViTConfig(**common, intermediate_size=config.ffn_dim), add_pooling_layer=False), seed
        )
    common |= dict(mlp_ratio=4, use_swiglu_ffn=config.gated)
    if config.num_registers:
        made = t.Dinov2WithRegistersModel(
            t.Dinov2WithRegistersConfig(**common, num_register_tokens=config.num_registers)
        )
    else:
        made = t.Dinov2Model(t.Dinov2Config(**common))
    return randomise(made, seed)


def hf_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    """Class token, registers and patches after the final norm, [B, N, C]."""
    extra = {"interpolate_pos_encoding": True} if type(model).__name__ == "ViTModel" else {}
    return model(pixels, **extra).last_hidden_state  # type: ignore[no-any-return]


def tokens(output: BackboneOutput) -> Tensor:
    """All tokens of our output, in the order class, registers, patches: [B, N, C]."""
    return torch.cat((output.cls_token[:, None], output.register_tokens, output.patch_tokens), dim=1)


def relative(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b, of any one shape, in float64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def worst_token(a: Tensor, b: Tensor) -> float:
    """The largest relative L2 distance of a token, for tokens [..., C]."""
    a, b = a.detach().double(), b.detach().double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def hf_shapes(config: ViTConfig) -> nn.Module:
    """`hf_model` on the meta device: names and shapes without values, at any size."""
    with torch.device("meta"), mock.patch.dict(globals(), randomise=lambda module, seed: module.eval()):
        return hf_model(config)


def hf_layers(model: nn.Module, pixels: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Tokens [B, N, C] after the final norm; and before it, of the embedding and of each block."""
    if type(model).__name__ == "ViTModel":
        options["interpolate_pos_encoding"] = True
    output = model(pixels, output_hidden_states=True, **options)
    return output.last_hidden_state, list(output.hidden_states)


def hf_norm(model: nn.Module) -> nn.Module:
    """The final norm of a transformers model."""
    return model.norm if hasattr(model, "norm") else model.layernorm  # type: ignore[return-value]


# (relative L2, the same of the worst token) by dtype.  float64: what is left is the RoPE table, which all build in
# float32 (1e-8 seen).  float32: rounding in another order of operations (5e-7 seen at depth 12, 1.3e-6 at most).
BOUNDS = {torch.float64: (1e-7, 1e-6), torch.float32: (5e-6, 5e-5)}


def assert_same(ours: Tensor, theirs: Tensor, what: str = "tokens") -> None:
    """Asserts equal shape and dtype, and values within `BOUNDS`, for tokens [..., C]."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), what
    if theirs.numel():
        found = relative(ours, theirs), worst_token(ours, theirs)
        limits = BOUNDS[theirs.dtype]
        assert found[0] <= limits[0], f"{what}: {found[0]:.1e} in all, {limits[0]:.1e} allowed"
        assert found[1] <= limits[1], f"{what}: {found[1]:.1e} in one token, {limits[1]:.1e} allowed"


def assert_same_tokens(ours: BackboneOutput | LayerOutput, theirs: Tensor, what: str = "output") -> None:
    """Asserts that class token, registers and patches are each within `BOUNDS` of theirs [B, N, C]."""
    prefix = 1 + ours.register_tokens.shape[1]
    assert_same(ours.cls_token, theirs[:, 0], f"{what}, class token")
    assert_same(ours.register_tokens, theirs[:, 1:prefix], f"{what}, registers")
    assert_same(ours.patch_tokens, theirs[:, prefix:], f"{what}, patches")


def pixels_of(config: ViTConfig, grid: tuple[int, int], batch: int = 1, seed: int = 1) -> Tensor:
    """Noise of h x w patches: [B, 3, H_px, W_px] float32."""
    size = (batch, 3, *(side * config.patch_size for side in grid))
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@dataclass
class Saved:
    """A random model of a peer, the config that ours must find in it, and the folder that the peer wrote."""

    config: ViTConfig
    model: nn.Module
    directory: Path

    def pair(self, dtype: torch.dtype) -> tuple[Backbone, Any]:
        """Our model, loaded from the folder, and theirs, in one dtype."""
        ours = Backbone.from_pretrained(self.directory, dtype=dtype, device="cpu")
        return ours, copy.deepcopy(self.model).to(dtype)

    @functools.cached_property
    def exact(self) -> tuple[Backbone, Any]:
        return self.pair(torch.float64)


def grid_cases(
    configs: Mapping[str, ViTConfig], *grids: tuple[int, int], slow: bool = False, native: bool = False
) -> list[Any]:
    """Test parameters (model, grid); `native` adds the grid of each model's position table."""
    marks = [pytest.mark.slow] if slow else []
    cases = []
    for name, config in configs.items():
        own = [(config.position_grid, config.position_grid)] if native and config.position_grid else []
        for h, w in dict.fromkeys([*grids, *own]):
            cases.append(pytest.param(name, (h, w), id=f"{name}-{h}x{w}", marks=marks))
    return cases
