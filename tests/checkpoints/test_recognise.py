"""Errors name the content of a file: a Backbone's state_dict, an adapter, a backbone inside a larger model."""

import json
from pathlib import Path

import pytest
import torch
from layouts import in_memory, meta_named, put
from oracles import SMALL, hf_model

from dinov3_infer import Backbone, CheckpointError, UnsupportedError
from dinov3_infer.zoo import ARCHITECTURES


def state() -> dict[str, torch.Tensor]:
    return meta_named(hf_model(SMALL["dinov3"]).state_dict(), SMALL["dinov3"])


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "_orig_mod."])
@pytest.mark.parametrize("name", ["nano", "dinov3_vits16", "dinov3_vits16plus", "dinov2_vits14", "dino_vits16"])
def test_a_state_dict_of_ones_own_with_a_name(name: str, prefix: str, tmp_path: Path) -> None:
    """State dicts as Lightning, accelerate, DDP and torch.compile write them."""
    bb = Backbone.from_config(name, seed=0)
    torch.save({prefix + k: v for k, v in bb.state_dict().items()}, tmp_path / "a.pth")
    assert Backbone.from_pretrained(name, weights=tmp_path / "a.pth", device="cpu").fingerprint() == bb.fingerprint()


@pytest.mark.parametrize("name", [n for n in ("dinov2_vitg14", "dinov2_vitg14_reg") if n in ARCHITECTURES])
def test_a_gated_state_dict_with_learned_positions(name: str) -> None:
    from dinov3_infer.checkpoints.describe import describe
    from dinov3_infer.checkpoints.reading import Checkpoint, TensorsInMemory
    from dinov3_infer.zoo import MODELS

    with torch.device("meta"):
        tensors = Backbone(ARCHITECTURES[name], None).state_dict()
    checkpoint = Checkpoint("a.pth", TensorsInMemory(tensors))
    assert describe(checkpoint, expected=MODELS[name]).config == ARCHITECTURES[name]
    with pytest.raises(CheckpointError, match="state_dict of a Backbone without its config; give the model's name"):
        describe(checkpoint)


@pytest.mark.parametrize(
    "form", ["lora_A.weight", "lora_B.default.weight", "lora_magnitude_vector", "lokr_w1", "hada_w1_a"]
)
@pytest.mark.parametrize("prefix", ["base_model.model.", "", "backbone.base_model.model."])
def test_an_adapter_is_told_from_a_model(prefix: str, form: str, tmp_path: Path) -> None:
    adapter = {f"{prefix}blocks.0.attn.qkv.{form}": torch.zeros(4, 64)}
    whole = {prefix + n.replace("attn.qkv.", "attn.qkv.base_layer."): t for n, t in state().items()}
    (tmp_path / "adapter").mkdir()
    put(tmp_path / "adapter", adapter, file="adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter without its model .* merge it .*, and save the result"):
        Backbone.from_pretrained(tmp_path / "adapter", device="cpu")
    with pytest.raises(CheckpointError, match="an adapter that is not merged .* merge it"):
        in_memory(whole | adapter)


@pytest.mark.parametrize("rest", ["decoder.head.weight", "neck.0.weight", "transformer.layers.0.linear.weight"])
@pytest.mark.parametrize("prefix", ["backbone.", "pretrained.", "aggregator.patch_embed.", "encoder.0."])
def test_what_is_lifted_out_of_a_larger_model_is_said(prefix: str, rest: str, caplog: pytest.LogCaptureFixture) -> None:
    in_memory({prefix + name: tensor for name, tensor in state().items()} | {rest: torch.zeros(2)})
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(f"under '{prefix}'" in line and "to a larger model" in line and rest in line for line in warned)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"backbone_config": c}, lambda c: {"a": {"b": c}}])
@pytest.mark.parametrize("field", ["num_windows", "window_size", "window_block_indexes"])
def test_windowed_attention_is_refused(field: str, wrap: object, tmp_path: Path) -> None:
    folder = put(tmp_path, state(), {})
    (folder / "config.json").write_text(json.dumps(wrap({field: [4]})))  # type: ignore[operator]
    with pytest.raises(UnsupportedError, match=f"states {field}"):
        Backbone.from_pretrained(folder, device="cpu")
