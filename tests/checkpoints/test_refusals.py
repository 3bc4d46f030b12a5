"""Models near DINO are refused by name with the reason, wherever the name appears; DINO's own names never are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import hub, put, timm_named, wrapped
from oracles import SMALL, hf_model

from dinov3_infer import Backbone, UnsupportedError
from dinov3_infer.checkpoints.refusals import refuse_config, refuse_id
from dinov3_infer.zoo import MODELS

IDS = {
    "C-RADIO": ("nvidia/C-RADIOv3-B", "nvidia/RADIO-L", "timm/vit_base_patch16_radio_v3", "nvidia/c-radiov4-h"),
    "Sapiens2": ("facebook/sapiens2-1b", "timm/vit_huge_patch16_sapiens2.x"),
    "RudolfV-2": ("Aignostics/RudolfV-2",),
    "GenBio-PathFM": ("genbio-ai/genbio-pathfm",),
    "Pixio": ("facebook/pixio-vith16",),
    "I-JEPA": ("facebook/ijepa_vith14_1k", "someone/i-jepa"),
    "Perception Encoder": ("facebook/PE-Core-B16-224", "vit_pe_core_base_patch16_224", "facebook/PE-Spatial-G14-448"),
    "SigLIP": ("google/siglip2-base-patch16-224", "vit_base_patch16_siglip_224", "google/siglip-so400m"),
    "EVA": ("BAAI/EVA", "timm/eva02_base_patch14_224.mim_in22k", "QuanSun/EVA-CLIP"),
    "DEIMv2": ("Intellindust/DEIMv2_DINOv3_S_COCO",),
    "EoMT": ("tue-mps/coco_panoptic_eomt_large_640", "tue-mps/eomt-dinov3-coco"),
}
TYPES = {
    "C-RADIO": {"model_type": "radio"}, "Sapiens2": {"model_type": "sapiens2"}, "Pixio": {"model_type": "pixio"},
    "I-JEPA": {"model_type": "ijepa"}, "SigLIP": {"model_type": "siglip_vision_model"},
    "EVA": {"architecture": "eva02_base_patch14_224"}, "DEIMv2": {"model_type": "deimv2"},
    "EoMT": {"model_type": "eomt_dinov3"},
    "Perception Encoder": {"pretrained_cfg": {"architecture": "vit_pe_core_base_patch16_224"}},
}  # fmt: skip


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in IDS.items() for name in names])
def test_by_its_id(kind: str, name: str) -> None:
    """The refusal comes before any download."""
    with pytest.raises(UnsupportedError, match=rf"'{name}' is {kind}.*: it.* not supported; load it with"):
        Backbone.from_pretrained(name, local_files_only=True)


@pytest.mark.parametrize("kind", TYPES)
def test_by_its_config(kind: str, tmp_path: Path) -> None:
    path = put(tmp_path, timm_named(hf_model(SMALL["dinov2"]).state_dict(), SMALL["dinov2"]), TYPES[kind])
    with pytest.raises(UnsupportedError, match=f"is {kind}"):
        Backbone.from_pretrained(path, device="cpu")


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize(
    "name, why",
    [
        ("blocks.0.attn.q_norm.weight", "normalises queries and keys"),
        ("norm_pre.weight", "norm before its blocks"),
        ("attn_pool.latent", "pools by attention"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.1.mlp.norm.weight", "norms inside"),
    ],
)
def test_by_its_tensors(name: str, why: str, prefix: str, tmp_path: Path) -> None:
    state = timm_named(hf_model(SMALL["dinov2"]).state_dict(), SMALL["dinov2"]) | {name: torch.ones(64)}
    with pytest.raises(UnsupportedError, match=rf"{why}.* \('{name}'\)"):
        Backbone.from_pretrained(put(tmp_path, wrapped(state, prefix)), device="cpu")


def test_by_the_number_of_its_class_tokens(tmp_path: Path) -> None:
    state = timm_named(hf_model(SMALL["dinov2"]).state_dict(), SMALL["dinov2"])
    state["cls_token"] = torch.zeros(1, 8, 64)
    with pytest.raises(UnsupportedError, match="8 class tokens"):
        Backbone.from_pretrained(put(tmp_path, state), device="cpu")


@pytest.mark.parametrize("live", [False, True])
def test_i_jepa_has_no_class_token(live: bool, tmp_path: Path) -> None:
    from transformers import IJepaConfig, IJepaModel

    made = IJepaModel(IJepaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    with pytest.raises(UnsupportedError, match="I-JEPA: it has no class token"):
        Backbone.adopt(made) if live else Backbone.from_pretrained(hub(tmp_path, made), device="cpu")


@pytest.mark.parametrize(
    "name",
    ["microsoft/rad-dino", "Snarcy/RadioDino-s16", "someone/eva-of-dinov2", "google/tipsv2-b14", "histai/hibou-b",
     "owkin/phikon-v2", "paige-ai/Virchow2", "bioptimus/H-optimus-0", "MahmoodLab/UNI2-h", "kaiko-ai/midnight",
     "facebook/webssl-dino1b-full2b-224", "prov-gigapath/prov-gigapath", "someone/evaluation", "radiology/vit"],
)  # fmt: skip
def test_other_names_pass(name: str) -> None:
    refuse_id(name)


def test_no_row_is_refused() -> None:
    for row in MODELS.values():
        for name in (row.name, row.hub_id, row.timm_id):
            refuse_id(name or "")
    config: dict[str, Any]
    for config in ({}, {"model_type": "dinov2"}, {"architecture": "vit_small_patch16_dinov3"}, {"pretrained_cfg": []}):
        refuse_config(config, "x")
