"""What a checkpoint is said to be: its row of the zoo, its transform, its layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from layouts import meta_named
from oracles import SMALL, hf_model

from dinov3_infer import Backbone, CheckpointError, InputError, ViTConfig
from dinov3_infer.checkpoints.architecture import rows_like
from dinov3_infer.checkpoints.describe import describe, identity
from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory, open_checkpoint
from dinov3_infer.zoo import ARCHITECTURES, MODELS, ModelInfo


def row_of(config: ViTConfig, path: str = "", stated: dict[str, Any] | None = None) -> ModelInfo | None:
    return identity(rows_like(config), Checkpoint(path, TensorsInMemory({}), stated or {}))


@pytest.mark.parametrize(
    "architecture, path, stored, name",
    [
        ("dinov3_vits16", None, {}, "dinov3_vits16"),
        ("dinov3_vits16", None, {"dinov3_infer": {"name": "lingbot_vits16"}}, "lingbot_vits16"),
        ("dinov3_vits16", None, {"pretrained_cfg": {"tag": "robbyant"}}, "lingbot_vits16"),
        ("dinov3_vits16", None, {"pretrained_cfg": {"tag": "lvd1689m"}}, "dinov3_vits16"),
        ("dinov3_vitl16", None, {"pretrained_cfg": {"tag": "sat493m"}}, "dinov3_vitl16_sat493m"),
        ("dinov3_vitl16", "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth", {}, "dinov3_vitl16_sat493m"),
        ("dinov3_vitl16", "dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", {}, "dinov3_vitl16"),
        ("dinov2_vitb14_reg", None, {"dinov3_infer": {"name": 3}, "pretrained_cfg": []}, "dinov2_vitb14_reg"),
    ],
)  # fmt: skip
def test_models_of_one_shape_are_told_apart(architecture: str, path: str | None, stored: Any, name: str) -> None:
    """By our own config.json, by timm's tag, or by the name of Meta's file."""
    row = row_of(ARCHITECTURES[architecture], path or "", stored)
    assert row is not None and row.name == name


def test_the_norm_for_local_crops_tells_the_satellite_model() -> None:
    row = row_of(replace(ARCHITECTURES["dinov3_vitl16"], local_cls_norm=True))
    assert row is not None and row.name == "dinov3_vitl16_sat493m"


def test_a_saved_model_keeps_its_name_and_its_mean(tmp_path: Path) -> None:
    bb = Backbone.from_config("nano", seed=0)
    bb.preprocess = replace(bb.preprocess, mean=MODELS["dinov3_vitl16_sat493m"].mean)
    loaded = Backbone.from_pretrained(bb.save_pretrained(tmp_path))
    assert loaded.info is MODELS["nano"] and loaded.preprocess == bb.preprocess


@pytest.mark.parametrize("file", ["preprocessor_config.json", "config.json"])
def test_a_wrong_mean_is_said_with_its_file(file: str, tmp_path: Path) -> None:
    Backbone.from_config("nano", seed=0).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    stored = json.loads(path.read_text()) if (path := tmp_path / file).exists() else {}
    path.write_text(json.dumps(stored | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0, 0.2]}))
    with pytest.raises(CheckpointError, match=rf"^{file} of '{tmp_path}' is wrong: std is three numbers.*got"):
        Backbone.from_pretrained(tmp_path)


def test_nothing_is_read_to_describe(tmp_path: Path) -> None:
    """Row, network and transform are known from names, shapes and the files beside the weights."""
    bb = Backbone.from_config("nano", seed=0)
    checkpoint = open_checkpoint(bb.save_pretrained(tmp_path))
    checkpoint.tensors.read = None  # type: ignore[method-assign, assignment]
    found = describe(checkpoint)
    assert (found.config, found.info, found.preprocess) == (bb.config, bb.info, bb.preprocess)
    assert (found.stored.layout.label, found.stored.depth) == ("hf (dinov3)", bb.config.depth)


def test_a_transform_for_named_models_only() -> None:
    """Of Meta, transformers and timm nobody says what they do with an image of an architecture of one's own."""
    state = meta_named(hf_model(SMALL["dinov3"]).state_dict(), SMALL["dinov3"])
    with pytest.raises(InputError, match="preprocessing='hf' needs a known architecture"):
        describe(Checkpoint("a.file", TensorsInMemory(state)), preprocessing="hf")


def test_a_live_module_knows_better_than_its_config() -> None:
    state = meta_named(hf_model(SMALL["dinov3"]).state_dict(), SMALL["dinov3"])
    known = {"num_heads": 2, "norm_eps": 1e-3}
    config = describe(Checkpoint("a module", TensorsInMemory(state), known=known)).config
    assert (config.num_heads, config.norm_eps) == (2, 1e-3)
