"""The transform is the one that the files beside the weights state, or an error names the unsupported part."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov3_infer import Backbone, CheckpointError, UnsupportedError
from dinov3_infer.model.vit import ViTConfig
from dinov3_infer.zoo import CORRECTIONS, preprocess_of

OWN = ViTConfig(64, 1, 1, 128, patch_size=14, position_grid=7, num_registers=0, key_bias=True)
HF: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 112}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 98, "width": 98}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.53, 0.52, 0.51], "image_std": [0.26, 0.25, 0.24],
}  # fmt: skip
TIMM: dict[str, Any] = {
    "input_size": [3, 98, 98], "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
    "mean": [0.7, 0.57, 0.7], "std": [0.21, 0.23, 0.17],
}  # fmt: skip


def image() -> Any:
    return np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Backbone.from_config(OWN, seed=0).save_pretrained(tmp_path_factory.mktemp("own"))


def beside(written: Path, folder: Path, processor: Any = None, timm: Any = None) -> Path:
    """The same weights beside another statement."""
    config = json.loads((written / "config.json").read_text())
    del config["dinov3_infer"]
    if timm is not None:
        config = {"architecture": "vit_x", "model_args": {"num_heads": 1, "norm_eps": 1e-5}, "pretrained_cfg": timm}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((written / "model.safetensors").read_bytes())
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [60.0] * 3},
        {"resample": 2},
        {"do_center_crop": False, "size": {"height": 98, "width": 98}},
        {"do_center_crop": False, "size": {"height": 98, "width": 112}},
        {"size": {"height": 98, "width": 98}},
        {"crop_size": {"height": 112, "width": 112}},
        {"size": {"shortest_edge": 141}},
    ],
)
def test_the_processor_is_followed(written: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    """By default and on request; compared with transformers on one image."""
    from transformers import BitImageProcessorPil

    stated = HF | changes
    path = beside(written, tmp_path, stated)
    theirs = BitImageProcessorPil(**{k: v for k, v in stated.items() if k != "image_processor_type"})
    expected = torch.as_tensor(np.array(theirs(image())["pixel_values"])[0])
    for style in (None, "hf"):
        bb = Backbone.from_pretrained(path, preprocessing=style, device="cpu")
        found = bb.preprocess(image())
        assert found.shape == expected.shape and (found - expected).abs().max() < 2e-5
        assert all(bb.origin[n].endswith("from preprocessor_config.json") for n in ("transform", "mean and std"))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"do_center_crop": False}, "without a centre crop"),
        ({"do_resize": False}, "do_resize false"),
        ({"resample": 1}, "the resample 1"),
        ({"resample": 0}, "the resample 0"),
        ({"crop_size": {"height": 140, "width": 140}}, "centre crop of 140x140"),
        ({"size": {"shortest_edge": 112, "longest_edge": 300}}, "centre crop"),
        ({"size": "large"}, "the size 'large'"),
        ({"do_pad": True}, "do_pad"),
        ({"offset": True}, "offset"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
    ],
)
def test_what_is_not_here_is_said(
    written: Path, changes: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = beside(written, tmp_path, HF | changes)
    with pytest.raises(UnsupportedError, match=said):
        Backbone.from_pretrained(path, preprocessing="hf", device="cpu")
    Backbone.from_pretrained(path, device="cpu")
    assert any(said in record.getMessage() and record.levelname == "WARNING" for record in caplog.records)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, dict(size=98, fit="crop", resize_to=112, filter="bicubic")),
        ({"crop_pct": 1.0}, dict(size=98, fit="crop", resize_to=None)),
        ({"crop_pct": 0.9, "interpolation": "bilinear"}, dict(size=98, resize_to=108, filter="bilinear")),
        ({"crop_mode": "squash", "crop_pct": 1.0}, dict(size=98, fit="squash")),
        ({"crop_mode": "squash", "crop_pct": 1, "input_size": [3, 98, 112]}, dict(size=(98, 112), fit="squash")),
    ],
)
@pytest.mark.parametrize("style", [None, "timm"])
def test_the_config_of_timm_is_followed(
    changes: dict[str, Any], expected: dict[str, Any], style: Any, tmp_path: Path
) -> None:
    bb = Backbone.from_pretrained(timm_folder(tmp_path, TIMM | changes), preprocessing=style, device="cpu")
    assert {name: getattr(bb.preprocess, name) for name in expected} == expected
    assert (bb.preprocess.mean, bb.preprocess.engine) == ((0.7, 0.57, 0.7), "pil")
    assert bb.origin["transform"].endswith("px, " + bb.preprocess.filter + ", pil, from config.json")


@pytest.mark.parametrize("changes", [{"interpolation": "lanczos"}, {"crop_mode": "border"}, {"input_size": "x"}])
def test_what_timm_states_and_is_not_here_is_said(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is not supported; leave preprocessing out"):
        Backbone.from_pretrained(timm_folder(tmp_path, TIMM | changes), preprocessing="timm", device="cpu")


def timm_folder(folder: Path, cfg: dict[str, Any]) -> Path:
    bb = Backbone.from_config(OWN, seed=0)
    bb.save_pretrained(folder / "model.safetensors", layout="meta")
    config = {"architecture": "vit_x", "model_args": {"num_heads": 1, "norm_eps": 1e-5}, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_ones_own_has_the_size_of_its_positions(written: Path, tmp_path: Path) -> None:
    bb = Backbone.from_pretrained(beside(written, tmp_path), device="cpu")
    assert bb.preprocess.size == 98


def test_no_statistics_are_taken_in_silence(written: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bb = Backbone.from_pretrained(beside(written, tmp_path), device="cpu")
    assert "default" in bb.origin["mean and std"] and "and the mean and std; used" in caplog.text


def test_a_published_processor_changes_nothing(tmp_path: Path) -> None:
    bb = Backbone.from_config("dinov3_vits16", seed=0)
    assert Backbone.from_pretrained(bb.save_pretrained(tmp_path), device="cpu").preprocess == bb.preprocess
    edited = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"size": {"height": 320, "width": 320}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(edited))
    found = Backbone.from_pretrained(tmp_path, device="cpu").preprocess
    assert found == replace(preprocess_of(bb.info, "hf"), size=320)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        dict(size=112), dict(size=(98, 112)), dict(fit="crop", resize_to=112, engine="pil"), dict(fit="pad"),
        dict(fit="native"), dict(mean=(0.0,) * 3, std=(1.0,) * 3), dict(engine="float", filter="bicubic"),
    ],
)  # fmt: skip
def test_what_is_saved_is_what_is_loaded(changes: dict[str, Any], tmp_path: Path) -> None:
    for number, name in enumerate((OWN, "nano", "dinov2_vits14")):
        bb = Backbone.from_config(name, seed=0)
        side = 7 * bb.config.patch_size
        values = {
            n: tuple(v // 14 * bb.config.patch_size for v in value) if n == "size" and isinstance(value, tuple)
            else value // 14 * bb.config.patch_size if n in ("size", "resize_to") else value
            for n, value in changes.items()
        }  # fmt: skip
        bb.preprocess = replace(bb.preprocess, **({"size": side} | values))
        again = Backbone.from_pretrained(bb.save_pretrained(tmp_path / str(number)), device="cpu")
        assert again.preprocess == bb.preprocess


@pytest.mark.parametrize(
    "changes, layout, lost",
    [
        (dict(fit="pad"), "hf", "cannot store fit 'pad'"),
        (dict(fit="native"), "timm", "cannot store fit 'native'"),
        (dict(fit="crop", size=(112, 98)), "hf", "a crop to the size"),
        (dict(size=(112, 98)), "timm", "a squash to the size"),
        (dict(size=(112, 98)), "hf", ""),
        (dict(fit="crop", size=98, resize_to=101, engine="pil"), "timm", ""),
        (dict(size=112), "timm", ""),
    ],
)
def test_what_the_layout_of_others_cannot_hold_is_said(
    changes: dict[str, Any], layout: Any, lost: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This package reads its own block; without the block the other files are used as written."""
    bb = Backbone.from_config("dinov2_vits14", seed=0)
    bb.preprocess = replace(bb.preprocess, **changes)
    path = bb.save_pretrained(tmp_path, layout)
    assert lost in caplog.text and ("use the family's default transform" in caplog.text) is bool(lost)
    assert Backbone.from_pretrained(path, device="cpu").preprocess == bb.preprocess
    if lost:
        return
    config = json.loads((path / "config.json").read_text())
    block = config.pop("dinov3_infer")
    (path / "config.json").write_text(json.dumps(config))
    found = Backbone.from_pretrained(path, device="cpu").preprocess
    assert block["preprocess"]["size"] in (found.size, list(found.size) if isinstance(found.size, tuple) else None)
    assert (found.fit, found.resize_to, found.filter) == (
        bb.preprocess.fit,
        bb.preprocess.resize_to,
        bb.preprocess.filter,
    )


@pytest.mark.parametrize("wrong", [{"size": "x"}, {"fit": "round"}, {"mean": [1, 2]}, {"std": [0, 0, 0]}])
def test_a_damaged_block_is_an_error(wrong: dict[str, Any], tmp_path: Path) -> None:
    bb = Backbone.from_config(OWN, seed=0)
    path = bb.save_pretrained(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    config["dinov3_infer"]["preprocess"] |= wrong
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json of .* is wrong"):
        Backbone.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_config_that_is_known_to_be_wrong_is_corrected(name: str, tmp_path: Path) -> None:
    """The correction is the default and names its source; `preprocessing="timm"` gives the repository's statement."""
    folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / "ab12"
    folder.mkdir(parents=True)
    timm_folder(folder, TIMM)
    bb = Backbone.from_pretrained(folder, device="cpu")
    assert (bb.preprocess.mean, bb.preprocess.std) == CORRECTIONS[name][:2] and bb.preprocess.size == 98
    assert CORRECTIONS[name][2] in bb.origin["mean and std"]
    assert Backbone.from_pretrained(folder, preprocessing="timm", device="cpu").preprocess.mean == (0.7, 0.57, 0.7)
    assert Backbone.from_pretrained(timm_folder(tmp_path, TIMM), device="cpu").preprocess.mean == (0.7, 0.57, 0.7)
