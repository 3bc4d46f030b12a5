"""`convert`: the same weights in another layout, read back and compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runs import refused, run, small_model
from safetensors.torch import load_file

from dinov3_infer import Backbone
from dinov3_infer.zoo import ARCHITECTURES


@pytest.mark.parametrize(("to", "name"), [("hf", "out"), ("meta", "out.pth"), ("meta", "out.safetensors")])
def test_convert(to: str, name: str, tmp_path: Path) -> None:
    source, out = small_model(), tmp_path / name
    before = Backbone.from_pretrained(source).fingerprint()
    ran = run("convert", source, out, "--to", to)
    assert (ran.status, ran.out) == (0, "")
    assert f"wrote '{out}' in the layout {to}; read back, it has the fingerprint of '{source}': {before[:9]}" in ran.err
    assert Backbone.from_pretrained(out, layout=to).fingerprint() == before
    refused(1, "exists already|is not empty", "convert", source, out, "--to", to)
    assert run("convert", source, out, "--to", to, "--overwrite").status == 0


def test_convert_to_timm_and_back(tmp_path: Path) -> None:
    source = Backbone.from_config("dino_vits16", seed=0).save_pretrained(tmp_path / "hf")
    assert run("convert", source, tmp_path / "timm", "--to", "timm").status == 0
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_224"
    assert run("convert", tmp_path / "timm", tmp_path / "back", "--to", "hf").status == 0
    first, last = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert first.keys() == last.keys() and all(first[name].shape == last[name].shape for name in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_convert_keeps_the_precision_of_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Backbone.from_pretrained(small_model(), dtype=dtype).save_pretrained(tmp_path / "half")
    assert run("convert", source, tmp_path / "m.safetensors", "--to", "meta").status == 0
    found = load_file(tmp_path / "m.safetensors")
    assert found["blocks.0.mlp.fc1.weight"].dtype == dtype
    assert (tmp_path / "m.safetensors").stat().st_size < 1.05 * (source / "model.safetensors").stat().st_size


def test_convert_by_the_layout_that_is_told(tmp_path: Path) -> None:
    """Meta and timm use the same names for DINO, with different rules for positions."""
    config = replace(ARCHITECTURES["dino_vits16"], embed_dim=64, depth=2, num_heads=1, ffn_dim=128, position_grid=4)
    source = Backbone.from_config(config, seed=0).save_pretrained(tmp_path / "m.pth", layout="meta")
    refused(1, "convert' with --num-heads", "convert", source, tmp_path / "x", "--to", "hf", "--layout", "timm")
    guessed = run("convert", source, tmp_path / "guessed", "--to", "hf", "--num-heads", 1)
    told = run("convert", source, tmp_path / "told", "--to", "hf", "--layout", "timm", "--num-heads", 1)
    assert guessed.status == told.status == 0
    assert "use the same names; read as 'meta'" in guessed.err and "same names" not in told.err


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    source = small_model()
    refused(1, "timm reads only architectures", "convert", source, tmp_path / "t", "--to", "timm")
    refused(1, r"should end in \.pth or \.safetensors", "convert", source, tmp_path / "t", "--to", "meta")
    refused(1, "no weights at", "convert", tmp_path / "x.pth", tmp_path / "t", "--to", "hf")
    refused(1, "make it first", "convert", source, tmp_path / "a" / "b", "--to", "hf")
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_went_wrong_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = iter(["a", "b"])
    monkeypatch.setattr(Backbone, "fingerprint", lambda _: next(fingerprints))
    refused(1, "the weights written to .* differ from", "convert", small_model(), tmp_path / "x", "--to", "hf")
