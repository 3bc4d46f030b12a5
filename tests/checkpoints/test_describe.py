"""The description of a checkpoint: its model of the zoo, its transform, its layout."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from layouts import meta_named
from oracles import SMALL, hf_model

from dinov3_infer import Backbone, CheckpointError, InputError
from dinov3_infer.checkpoints.describe import describe
from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory, open_checkpoint
from dinov3_infer.zoo import MODELS


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
    """Names, shapes and the files beside the weights suffice for model, network and transform."""
    bb = Backbone.from_config("nano", seed=0)
    checkpoint = open_checkpoint(bb.save_pretrained(tmp_path))
    checkpoint.tensors.read = None  # type: ignore[method-assign, assignment]
    found = describe(checkpoint)
    assert (found.config, found.info, found.preprocess) == (bb.config, bb.info, bb.preprocess)
    assert (found.stored.layout.label, found.stored.depth) == ("hf (dinov3)", bb.config.depth)


def test_a_transform_for_named_models_only() -> None:
    """Meta, transformers and timm state no transform for a custom architecture."""
    state = meta_named(hf_model(SMALL["dinov3"]).state_dict(), SMALL["dinov3"])
    with pytest.raises(InputError, match="preprocessing='hf' needs a known architecture"):
        describe(Checkpoint("a.file", TensorsInMemory(state)), preprocessing="hf")


def test_a_live_module_knows_better_than_its_config() -> None:
    state = meta_named(hf_model(SMALL["dinov3"]).state_dict(), SMALL["dinov3"])
    known = {"num_heads": 2, "norm_eps": 1e-3}
    config = describe(Checkpoint("a module", TensorsInMemory(state), known=known)).config
    assert (config.num_heads, config.norm_eps) == (2, 1e-3)
