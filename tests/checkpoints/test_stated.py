"""Heads, epsilon and activation are those that are stated, and a missing statement is an error."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import hub, load, meta_named, put, same_features, timm_named
from oracles import SMALL, hf_model, randomise, relative, tokens

from dinov3_infer import Backbone, CheckpointError, Dinov3Error, UnsupportedError, ViTConfig
from dinov3_infer.checkpoints.describe import describe
from dinov3_infer.checkpoints.loading import load_model
from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory
from dinov3_infer.checkpoints.stated import stated, timm_heads


@pytest.mark.parametrize(
    "beside",
    [
        {"architecture": "vit_unheard_of", "model_args": {"num_heads": 2, "norm_eps": 1e-4}},
        {"model_type": "some_vit", "num_attention_heads": 2, "layer_norm_eps": 1e-4},
        {"model_type": "vit_mae", "hidden_size": 64, "num_attention_heads": 2, "layer_norm_eps": 1e-4},
        {"model_type": "tower", "vision_config": {"hidden_size": 64, "num_attention_heads": 2, "layer_norm_eps": 1e-4}},
        {"model_type": "depth", "backbone_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-4}},
        {"hidden_size": 4096, "num_heads": 32, "vision_config": {"num_heads": 2, "norm_eps": 1e-4}},
    ],
)
def test_what_any_config_states_is_taken(beside: dict[str, Any], tmp_path: Path) -> None:
    config = replace(SMALL["dinov2"], num_heads=2, norm_eps=1e-4)
    source = hf_model(config)
    ours = load(put(tmp_path, timm_named(source.state_dict(), config), beside))
    assert (ours.config.num_heads, ours.config.norm_eps) == (2, 1e-4)
    assert "config.json" in ours.origin["num_heads"] and "config.json" in ours.origin["norm_eps"]
    same_features(ours, source)


@pytest.mark.parametrize("beside", [{}, {"architecture": "vit_unheard_of"}, {"model_type": "some_vit"}])
@pytest.mark.parametrize("config", [SMALL["dinov2_reg"], SMALL["dino"]])
def test_heads_that_nobody_states_are_asked_for(config: ViTConfig, beside: dict[str, Any], tmp_path: Path) -> None:
    config = replace(config, num_heads=2, norm_eps=1e-6)
    source = hf_model(config)
    path = put(tmp_path, timm_named(source.state_dict(), config), beside)
    with pytest.raises(CheckpointError, match=r"nothing states the number of attention heads .* pass num_heads="):
        load(path)
    ours = load(path, num_heads=2)
    assert ours.origin["num_heads"] == "2, from num_heads="
    same_features(ours, source)


def test_two_statements_that_disagree_are_both_named(tmp_path: Path) -> None:
    config = SMALL["dinov3"]
    path = put(tmp_path, meta_named(hf_model(config).state_dict(), config), {"num_attention_heads": 8})
    with pytest.raises(CheckpointError, match="RoPE periods in the file gives 4 heads and config.json gives 8"):
        load(path)
    with pytest.raises(CheckpointError, match="num_heads= gives 2 heads and the RoPE periods in the file gives 4"):
        load(put(tmp_path / "bare", meta_named(hf_model(config).state_dict(), config)), num_heads=2)


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new", "quick_gelu", None])
def test_a_gate_of_another_activation_is_refused(activation: str | None, tmp_path: Path) -> None:
    path = hub(tmp_path, hf_model(SMALL["dinov3_gated"]))
    edit(path / "config.json", {"hidden_act": activation})
    with pytest.raises(UnsupportedError, match="activation"):
        load(path)


@pytest.mark.parametrize(
    "beside, gated",
    [
        ({"model_type": "some_vit", "hidden_act": "relu"}, False),
        ({"model_type": "some_vit", "hidden_act": "relu"}, True),
        ({"vision_config": {"hidden_act": "gelu_pytorch_tanh"}}, False),
        ({"model_args": {"act_layer": "gelu_tanh"}}, False),
        ({"model_args": {"act_layer": "torch.nn.GELU"}}, True),
    ],
)
def test_activations_of_any_config_are_read(beside: dict[str, Any], gated: bool) -> None:
    with pytest.raises(UnsupportedError, match="activation"):
        stated(beside, 64, gated)


@pytest.mark.parametrize(
    "beside", [{"model_args": {"act_layer": "torch.nn.SiLU"}}, {"model_args": {"act_layer": "silu"}}]
)
def test_the_gate_that_timm_states_is_taken(beside: dict[str, Any]) -> None:
    assert stated(beside, 64, True) == []


@pytest.mark.parametrize("value", ["12", 0, -1, True, 1.5, 10**12])
@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"model_args": c}, lambda c: {"vision_config": c}])
def test_numbers_that_are_none_are_refused(wrap: Any, value: Any) -> None:
    with pytest.raises(CheckpointError, match="num_heads"):
        stated(wrap({"num_heads": value}), 64, False)


@pytest.mark.peers
@pytest.mark.slow
def test_every_vit_of_the_installed_timm() -> None:
    """Every ViT of timm loads with timm's heads, epsilon, patch size and activation, or is refused."""
    import timm

    taken: list[str] = []
    for name in timm.list_models("vit_*"):
        with torch.device("meta"):
            theirs = timm.create_model(name)
        stated = {"architecture": name, "pretrained_cfg": dict(theirs.pretrained_cfg)}
        try:
            found = describe(Checkpoint(name, TensorsInMemory(theirs.state_dict()), stated)).config
        except Dinov3Error as error:
            assert not re.search(r"dinov\d|tipsv2|lingbot|\.dino", name), error
            continue
        block = theirs.blocks[0]
        patch = theirs.patch_embed.patch_size[0]
        assert (found.num_heads, found.norm_eps, found.patch_size) == (block.attn.num_heads, block.norm1.eps, patch), (
            name
        )
        assert type(block.mlp.act).__name__ == ("SiLU" if found.gated else "GELU"), name
        taken.append(name)
    assert len(taken) > 50
    for name in taken:
        sized = {} if "dinov3" in name or "lingbot" in name else {"dynamic_img_size": True}
        theirs = randomise(timm.create_model(name, depth=2, num_classes=0, **sized))
        state = {"architecture": name, "pretrained_cfg": dict(theirs.pretrained_cfg)}
        described = describe(Checkpoint(name, TensorsInMemory(theirs.state_dict()), state))
        if "norm.weight" not in described.stored.shapes:  # which only the account of its tensors finds
            with pytest.raises(CheckpointError, match=r"missing: norm\.weight"):
                load_model(Backbone, described)
            continue
        ours = load_model(Backbone, described)
        pixels = torch.randn(1, 3, 4 * ours.patch_size, 4 * ours.patch_size)
        with torch.no_grad():
            assert relative(tokens(ours(pixels)), theirs.forward_features(pixels)) < 5e-6, name


@pytest.mark.parametrize(
    "name, heads",
    [
        ("vit_huge_patch14_224", 16), ("vit_so400m_patch14_reg1_tipsv2", 16), ("vit_giant_patch14_dinov2", 24),
        ("vit_giant_patch14_224", 16), ("vit_giant_patch16_lingbot", 24), ("vit_huge_plus_patch16_dinov3", 20),
        ("vit_tiny_patch16_dinov3_qkvb", 3), ("vit_large_patch16_224", 16), ("vit_betwixt_patch32_clip_224", 10),
        ("vit_relpos_base_patch16_224", None), ("resnet50", None),
    ],
)  # fmt: skip
def test_heads_of_names_of_timm(name: str, heads: int | None) -> None:
    assert timm_heads(name) == heads


def edit(file: Path, changes: Mapping[str, Any]) -> None:
    import json

    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
