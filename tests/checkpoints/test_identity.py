"""Name and licence come from names, never from shapes, and are saved with the weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov3_infer import Backbone, ViTConfig
from dinov3_infer.checkpoints.identity import identify
from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory
from dinov3_infer.hub.publish import model_card
from dinov3_infer.zoo import ARCHITECTURES, MODELS, OWN, ModelInfo

LINGBOT_TAG = {"architecture": "vit_small_patch16_lingbot", "pretrained_cfg": {"tag": "robbyant"}}
V2_TAG = {"architecture": "vit_base_patch14_reg4_dinov2", "pretrained_cfg": {"tag": "lvd142m"}}


def row_of(config: ViTConfig, path: str = "", stated: dict[str, Any] | None = None, *extra: str) -> ModelInfo | None:
    tensors = TensorsInMemory({name: torch.zeros(1) for name in extra})
    return identify(Checkpoint(path, tensors, stated or {}), config, None)[0]


@pytest.mark.parametrize(
    "architecture, path, stated, name",
    [
        ("dinov3_vits16", "", {"dinov3_infer": {"name": "lingbot_vits16"}}, "lingbot_vits16"),
        ("dinov3_vits16", "", LINGBOT_TAG, "lingbot_vits16"),
        ("dinov3_vits16", "", {"pretrained_cfg": {"tag": "lvd1689m", "architecture": "vit_small_patch16_dinov3"}},
         "dinov3_vits16"),
        ("dinov3_vits16", "", {"architecture": "vit_small_patch16_dinov3_qkvb", "pretrained_cfg": {"tag": "lvd1689m"}},
         "dinov3_vits16"),
        ("dinov3_vits16", "", {"architecture": "vit_small_patch16_dinov3_qkvb",
         "pretrained_cfg": {"tag": "eupe_lvd1689m", "num_classes": 0}}, "eupe_vits16"),
        ("dinov3_vitl16", "", {"pretrained_cfg": {"tag": "sat493m"}}, "dinov3_vitl16_sat493m"),
        ("dinov2_vitb14_reg", "", V2_TAG, "dinov2_vitb14_reg"),
        ("dinov3_vitl16", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", {}, "dinov3_vitl16_sat493m"),
        ("dinov3_vitl16", "at/dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", {}, "dinov3_vitl16"),
        ("dinov2_vits14", "dinov2_vits14_pretrain.pth", {}, "dinov2_vits14"),
        ("eupe_vitb16", "EUPE-ViT-B.pt", {}, "eupe_vitb16"),
        ("dinov2_vits14", "hub/models--facebook--dinov2-small/snapshots/ab12", {}, "dinov2_vits14"),
        ("lingbot_vits16", "models--robbyant--lingbot-vision-vit-small/snapshots/a/model.pt", {}, "lingbot_vits16"),
    ],
)  # fmt: skip
def test_what_names_weights(architecture: str, path: str, stated: Any, name: str) -> None:
    row = row_of(ARCHITECTURES[architecture], path, stated)
    assert row is not None and row.name == name and not row.derived


@pytest.mark.parametrize(
    "path, stated, extra",
    [
        ("weights.pth", {}, ()),
        ("model.pt", {}, ()),
        ("models--someone--dinov2-base/snapshots/ab12", {"model_type": "dinov2"}, ()),
        ("", {"dinov3_infer": {"name": 3}, "pretrained_cfg": []}, ()),
        ("", {"dinov3_infer": {"name": None}} | V2_TAG, ()),
        ("", V2_TAG | {"num_classes": 10}, ()),
        ("", V2_TAG | {"pretrained_cfg": {"tag": "lvd142m", "num_classes": 3}}, ()),
        ("", V2_TAG, ("head.weight",)),
        ("", V2_TAG | {"architecture": "vit_base_patch14_mine"}, ()),
        ("", V2_TAG | {"pretrained_cfg": {"tag": ["lvd142m"]}}, ()),
        ("", {"dinov3_infer": {"name": "dinov2_vits14"}}, ()),
        ("dinov2_vits14_pretrain.pth", {}, ()),
    ],
)
def test_a_shape_names_nothing(path: str, stated: Any, extra: tuple[str, ...]) -> None:
    """A name of a model of another shape, or the old tag of a classifier, names nothing either."""
    assert row_of(ARCHITECTURES["dinov2_vitb14_reg"], path, stated, *extra) is None


@pytest.mark.parametrize("name", ["dinov2_vits14", "lingbot_vits16"])
def test_weights_without_a_name_claim_no_licence(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bb = Backbone.from_config(ARCHITECTURES[name], seed=0)
    assert bb.info is None
    for path in (bb.save_pretrained(tmp_path / "hf"), bb.save_pretrained(tmp_path / "own.pth", layout="meta")):
        again = Backbone.from_pretrained(path, device="cpu")
        assert again.info is None and again.preprocess == bb.preprocess
        assert again.origin["name"].startswith("none") and again.origin["licence"] == "not stated"
        card = model_card(again, "someone/mine", again.info, again.origin)
        assert "icen" not in card and "base_model" not in card
    assert "and the mean and std; used" in caplog.text  # of the .pth


@pytest.mark.parametrize(
    "name, layout",
    [("dinov2_vits14_reg", "hf"), ("lingbot_vits16", "hf"), ("dinov3_vits16", "timm"), ("eupe_vitt16", "timm")],
)
def test_weights_that_were_trained_on_are_derived(name: str, layout: Any, tmp_path: Path) -> None:
    first = Backbone.from_config(name, seed=0).save_pretrained(tmp_path / "first", layout)
    bb = Backbone.from_pretrained(first, device="cpu")
    assert bb.info == MODELS[name]
    assert Backbone.from_pretrained(bb.save_pretrained(tmp_path / "same", layout), device="cpu").info == bb.info
    with torch.no_grad():
        bb.norm.weight.mul_(1.5)
    for i in range(2):
        bb = Backbone.from_pretrained(bb.save_pretrained(tmp_path / str(i), layout), device="cpu")
        assert bb.info == replace(MODELS[name], derived=True) and f"derived from {name}" in bb.extra_repr()
        assert bb.origin["licence"].startswith(MODELS[name].licence)
    card = model_card(bb, "someone/mine", bb.info, bb.origin)
    assert "derived from it" in card and f"`{name}` applies: {MODELS[name].licence}" in card


def test_casting_and_moving_derive_nothing(tmp_path: Path) -> None:
    bb = Backbone.from_pretrained("nano", device="cpu")
    bb.to(torch.bfloat16).to("cpu").eval()
    assert Backbone.from_pretrained(bb.save_pretrained(tmp_path), device="cpu").info == MODELS["nano"]


def test_a_fingerprint_names_weights(tmp_path: Path) -> None:
    """nano is recognised under any file name."""
    bb = Backbone.from_pretrained("nano", device="cpu")
    again = Backbone.from_pretrained(bb.save_pretrained(tmp_path / "x.pth", layout="meta"), device="cpu")
    assert again.info == MODELS["nano"] and "fingerprint" in again.origin["name"]
    other = Backbone.from_config(MODELS["nano"].config, seed=0).save_pretrained(tmp_path / "y.pth", layout="meta")
    assert Backbone.from_pretrained(other, device="cpu").info is None


def test_the_name_that_the_caller_gives_counts(tmp_path: Path) -> None:
    path = Backbone.from_config(ARCHITECTURES["dinov2_vits14"], seed=0).save_pretrained(tmp_path / "x.pth", "meta")
    bb = Backbone.from_pretrained("dinov2_vits14", weights=path, device="cpu")
    assert bb.info == MODELS["dinov2_vits14"] and bb.origin["name"].endswith("the name that was asked for")
    derived = tmp_path / "derived"
    with torch.no_grad():
        bb.norm.bias.add_(1)
    again = Backbone.from_pretrained("dinov2_vits14", weights=bb.save_pretrained(derived), device="cpu")
    assert again.info is not None and again.info.derived


def test_random_weights_stay_their_authors(tmp_path: Path) -> None:
    bb = Backbone(MODELS["dino_vits8"].config, replace(MODELS["dino_vits8"], licence=OWN))
    assert json.loads((bb.save_pretrained(tmp_path) / "config.json").read_text())["dinov3_infer"]["from_scratch"]
    assert Backbone.from_pretrained(tmp_path, device="cpu").info == bb.info
