"""Models for other channels than RGB accept arrays and tensors with as many channels as their patches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import relative, tokens
from PIL import Image

from dinov3_infer import Backbone, CheckpointError, ImageError, InputError, ViTConfig

LEARNED: dict[str, Any] = dict(position_grid=4, num_registers=0, key_bias=True)


def own(channels: int, **changes: Any) -> ViTConfig:
    return ViTConfig(64, 2, 1, 128, patch_size=8, in_chans=channels, **changes)


def image(channels: int, dtype: Any = np.uint8) -> np.ndarray:
    drawn = np.random.default_rng(0).integers(0, 256, (41, 57, channels))
    return drawn.astype(np.uint8) if dtype == np.uint8 else (drawn / 255).astype(dtype)


@pytest.mark.parametrize("changes", [{}, LEARNED], ids=["rope", "learned"])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("layout", ["hf", "meta.safetensors"])
def test_saved_and_loaded(channels: int, changes: dict[str, Any], layout: str, tmp_path: Path) -> None:
    """A saved model keeps its mean and std, and gives the features of the plain module."""
    bb = Backbone.from_config(own(channels, **changes), seed=0)
    assert bb.preprocess.channels == channels
    kind, _, suffix = layout.partition(".")
    again = Backbone.from_pretrained(
        bb.save_pretrained(tmp_path / f"m{'.' * bool(suffix)}{suffix}", kind), device="cpu"
    )  # type: ignore[arg-type]
    assert again.config.in_chans == channels and again.preprocess == bb.preprocess
    given = image(channels)
    found = again.extract_features(given)
    with torch.no_grad():
        expected = again(again.preprocess.batch([given]).pixels)
    assert relative(found.last_hidden_state, tokens(expected)) < 1e-5
    for other in (torch.from_numpy(given).permute(2, 0, 1), [given], given.astype(np.float32) / 255):
        assert relative(again.extract_features(other).embedding, found.embedding) < 1e-2
    assert np.allclose(again.embed([given, given])[1], found.embedding, atol=1e-5)


@pytest.mark.parametrize("engine", ["uint8", "float", "pil"])
def test_every_channel_is_prepared_as_a_colour_is(engine: Any, tmp_path: Path) -> None:
    from dinov3_infer.images.preprocess import Preprocess

    four, rgb = image(4), image(4)[..., :3]
    options: dict[str, Any] = dict(patch_size=8, size=32, engine=engine, filter="bicubic")
    found = Preprocess((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8), **options)(four)
    expected = Preprocess((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), **options)(rgb)
    assert found.shape == (4, 32, 32) and (found[:3] - expected).abs().max() < 1e-6


def test_one_channel_may_have_no_dimension() -> None:
    bb = Backbone.from_config(own(1), seed=0)
    grey = image(1)
    expected = bb.extract_features(grey).embedding
    for given in (grey[..., 0], torch.from_numpy(grey[..., 0]), torch.from_numpy(grey[..., 0])[None]):
        assert torch.equal(bb.extract_features(given).embedding, expected)


def test_what_has_other_channels_is_said(tmp_path: Path) -> None:
    bb = Backbone.from_config(own(13), seed=0)
    Image.fromarray(image(3)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png' would be read as RGB, .* takes 13 channels"):
        bb.extract_features(tmp_path / "x.png")
    with pytest.raises(ImageError, match="would be read as RGB"):
        bb.extract_features(Image.open(tmp_path / "x.png"))
    with pytest.raises(ImageError, match=r"takes an array \[height, width, 13\]; .*\[41, 57, 3\]"):
        bb.extract_features(image(3))
    with pytest.raises(ImageError, match=r"takes a tensor \[13, height, width\]"):
        bb.extract_features(torch.rand(3, 41, 57))
    with pytest.raises(InputError, match=r"\[B, 13, height, width\]"):
        bb(torch.rand(1, 3, 32, 32))
    with pytest.raises(ImageError, match="RGB"):
        Backbone.from_config(own(3), seed=0).extract_features(image(4))


def test_statistics_of_another_number_of_channels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bb = Backbone.from_config(own(4), seed=0)
    path = bb.save_pretrained(tmp_path)
    config = json.loads((path / "config.json").read_text())
    del config["dinov3_infer"]
    (path / "config.json").write_text(json.dumps(config))

    def stated(values: list[float]) -> None:
        file = path / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": values, "image_std": values}))

    stated([0.1, 0.2, 0.3, 0.4])
    assert Backbone.from_pretrained(path, device="cpu").preprocess.mean == (0.1, 0.2, 0.3, 0.4)
    stated([0.5])
    assert Backbone.from_pretrained(path, device="cpu").preprocess.mean == (0.5,) * 4
    caplog.clear()
    stated([0.1, 0.2, 0.3])  # of RGB
    assert Backbone.from_pretrained(path, device="cpu").preprocess.channels == 4
    assert "nothing states the mean and std" in caplog.text
    stated([0.1, 0.2])
    with pytest.raises(CheckpointError, match="for 2 channels, but the patches have 4"):
        Backbone.from_pretrained(path, device="cpu")


@pytest.mark.peers
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_models_of_timm(channels: int) -> None:
    import timm
    from oracles import randomise

    theirs = randomise(timm.create_model("vit_small_patch16_dinov3", pretrained=False, in_chans=channels, depth=2))
    ours, pixels = Backbone.adopt(theirs), torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        assert relative(tokens(ours(pixels)), theirs.forward_features(pixels)) < 5e-6
