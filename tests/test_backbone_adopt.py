"""Live modules of transformers and timm become Backbones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from layouts import (
    SAME,
    pixels_for,
    same_features,
    small_models_are_known as small_models_are_known,
)
from oracles import SMALL, hf_model, tokens, worst_token
from torch import nn

from dinov3_infer import Backbone, CheckpointError, Dinov3Error


@pytest.mark.parametrize("key", SMALL)
def test_adopt_shares_what_both_keep_alike(key: str) -> None:
    """The features agree, and a change of a shared tensor is visible in both models."""
    source = hf_model(SMALL[key])
    model = Backbone.adopt(source)
    assert model.config == SMALL[key]
    same_features(model, source)
    theirs = {id(p) for p in source.parameters()}
    copied = {n.split(".", 2)[-1] for n, p in model.named_parameters() if id(p) not in theirs}
    joined = {"attn.qkv.weight", "attn.qkv.bias", "mlp.gate_up.weight", "mlp.gate_up.bias"}
    assert copied - {"mask_token"} <= joined  # DINOv3's mask token is a view with another shape
    if model.mask_token is not None:
        assert model.mask_token.data_ptr() == source.embeddings.mask_token.data_ptr()


@pytest.mark.parametrize("key", ["dinov3", "dinov2", "dino"])
def test_adopt_keeps_dtype_and_frozen_parameters(key: str) -> None:
    """bfloat16 stays, except for the RoPE angles; frozen parameters stay frozen, also in joined tensors."""
    source = hf_model(SMALL[key]).bfloat16().requires_grad_(False)
    model = Backbone.adopt(source)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope_periods is None or model.rope_periods.dtype == torch.float32
    assert not any(p.requires_grad for p in (*model.parameters(), *source.parameters()))
    assert all(p.requires_grad for p in Backbone.adopt(source.requires_grad_(True)).parameters())


class Wrapper(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = part, nn.Linear(64, 2)


def classifier(name: str, key: str) -> Callable[[], tuple[nn.Module, nn.Module]]:
    def make() -> tuple[nn.Module, nn.Module]:
        import transformers

        part = hf_model(SMALL[key])
        whole = getattr(transformers, name)(part.config)
        inner = getattr(whole, whole.base_model_prefix)
        inner.load_state_dict(part.state_dict())
        return whole.eval(), inner

    return make


@pytest.mark.parametrize(
    "make",
    [classifier("Dinov2ForImageClassification", "dinov2"),
     classifier("Dinov2WithRegistersForImageClassification", "dinov2_reg"),
     classifier("ViTForImageClassification", "dino")],
    ids=["dinov2", "dinov2_reg", "dino"],
)  # fmt: skip
def test_adopt_out_of_a_classifier(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    """The backbone inside a model with a head is adopted."""
    whole, inner = make()
    same_features(Backbone.adopt(whole), inner)


@pytest.mark.parametrize("key", ["dinov3", "dinov2", "dino"])
def test_adopt_out_of_a_module_of_ones_own(key: str) -> None:
    """A plain module wraps a transformers model; heads and epsilon come from the inner config."""
    source = hf_model(replace(SMALL[key], ffn_dim=4 * 64, norm_eps=1e-3))
    model = Backbone.adopt(Wrapper(source))
    assert (model.config.num_heads, model.config.norm_eps) == (4, 1e-3)
    same_features(model, source)


def test_adopt_refuses_what_is_no_vit() -> None:
    with pytest.raises(CheckpointError, match="a live Sequential"):
        Backbone.adopt(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(Dinov3Error, match="is a Backbone already"):
        Backbone.adopt(Backbone.from_config(SMALL["dinov3"]))


TIMM_MODELS = {  # (timm's name, how it differs): small ones through timm's own arguments
    "dinov3": ("vit_small_patch16_dinov3_qkvb", dict(embed_dim=64, depth=2, num_heads=4)),
    "dinov3_gated": ("vit_small_plus_patch16_dinov3", dict(embed_dim=64, depth=2, num_heads=4)),
    "dinov2": ("vit_small_patch14_dinov2", dict(embed_dim=64, depth=2, num_heads=4, img_size=70)),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", dict(embed_dim=64, depth=2, num_heads=4, img_size=70)),
    "dinov2_gated": ("vit_giant_patch14_dinov2", dict(embed_dim=96, depth=2, num_heads=4, img_size=70)),
    "dino": ("vit_small_patch8_224.dino", dict(embed_dim=64, depth=2, num_heads=4, img_size=40)),
}


@pytest.mark.peers
@pytest.mark.parametrize("key", TIMM_MODELS)
@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside_a_module"])
def test_adopt_timm(key: str, inside: bool) -> None:
    """For timm's live models the tokens agree, and parameters with equal layouts are shared."""
    import timm
    from oracles import randomise

    name, options = TIMM_MODELS[key]
    source = randomise(timm.create_model(name, pretrained=False, **options))
    model = Backbone.adopt(Wrapper(source) if inside else source)
    assert model.config.position_resize == "antialias"
    pixels = pixels_for(model.config)
    with torch.no_grad():
        assert worst_token(tokens(model(pixels)), source.forward_features(pixels)) < SAME
    assert model.blocks[0].attn.qkv.weight is source.blocks[0].attn.qkv.weight
