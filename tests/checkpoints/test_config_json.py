"""The files beside the weights: what sentence-transformers reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles import SMALL

from dinov3_infer import Backbone
from dinov3_infer.checkpoints.config_json import sentence_transformers_files
from dinov3_infer.zoo import MODELS, preprocess_of


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["nano", "dinov3_convnext_tiny", "dinov2_vits14", "dino_vits16"])
def test_a_saved_folder_says_how_to_pool(name: str, tmp_path: Path) -> None:
    """The first token after the final norm is the class token in every model of transformers that we write."""
    bb = Backbone.from_config(name, seed=0)
    folder = bb.save_pretrained(tmp_path / "model")
    modules = read(folder / "modules.json")
    assert [one["path"] for one in modules] == ["", "1_Pooling"] and [one["idx"] for one in modules] == [0, 1]
    pooling = {"embedding_dimension": bb.embed_dim, "pooling_mode": "cls", "include_prompt": True}
    assert read(folder / "1_Pooling" / "config.json") == pooling
    encoder = read(folder / "sentence_bert_config.json")
    assert encoder["modality_config"]["image"]["method_output_name"] == "last_hidden_state"
    side = bb.preprocess.size
    assert encoder["processing_kwargs"]["image"]["size"] == {"height": side, "width": side}
    again = Backbone.from_pretrained(folder, device="cpu")
    assert again.fingerprint() == bb.fingerprint() and again.preprocess == bb.preprocess
    bb.save_pretrained(folder)  # over what is there


def test_a_transform_that_the_processor_states_is_not_said_twice() -> None:
    row = MODELS["dinov2_vits14"]
    own = replace(preprocess_of(row), size=280, fit="crop")
    for preprocess, twice in ((preprocess_of(row), True), (own, False), (replace(own, fit="pad"), False)):
        found = sentence_transformers_files(384, preprocess, row)["sentence_bert_config.json"]
        assert ("processing_kwargs" in found) is twice


def test_other_layouts_have_none_of_it(tmp_path: Path) -> None:
    bb = Backbone.from_config("dinov2_vits14", seed=0)
    bb.save_pretrained(tmp_path / "timm", layout="timm")
    assert {path.name for path in (tmp_path / "timm").iterdir()} == {"config.json", "model.safetensors"}
    small = Backbone.from_config(SMALL["dinov2"], seed=0)
    small.save_pretrained(tmp_path / "x.safetensors", layout="meta")
    assert {path.name for path in tmp_path.iterdir()} == {"timm", "x.safetensors"}
