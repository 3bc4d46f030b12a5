"""`show depth` and `show segments`: the calls' results beside the photographs, with a scale and a legend below."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import refused, run
from oracles import randomise
from pictures import photo
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.cli import show as show_command
from dinov3_infer.released import attach
from dinov3_infer.released.attach import load_head
from dinov3_infer.released.catalogue import find_head
from dinov3_infer.released.depth import Depth, DepthMap
from dinov3_infer.released.segments import Segments
from dinov3_infer.tasks import depth_picture, segments_picture

SEGMENTS = "dinov2_vits14_ade20k_linear"


@pytest.fixture(scope="module")
def small() -> Backbone:
    return randomise(Backbone.from_config("dinov2_vits14"), 1)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(small: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads as files, and two images."""
    path = tmp_path_factory.mktemp("show_heads")
    torch.save(small.state_dict(), path / "backbone.pth")
    for name, kind in (("dinov2_vits14_dd", Depth), (SEGMENTS, Segments)):
        head = kind(find_head(name), small)
        for part in head.children():
            if part is not small:
                randomise(part, 3)
        head.save(path / f"{name}.safetensors")
    Image.fromarray(photo(60, 80)).save(path / "a.png")
    Image.fromarray(photo(70, 50, seed=2)).save(path / "b.png")
    return path


@pytest.fixture(autouse=True)
def backbone(monkeypatch: pytest.MonkeyPatch, small: Backbone) -> None:
    """In place of a download of DINOv2's."""
    monkeypatch.setattr(attach.Backbone, "from_pretrained", lambda *_, **__: small)


def pixels(picture: Image.Image | Path) -> np.ndarray:
    opened = Image.open(picture) if isinstance(picture, Path) else picture
    return np.asarray(opened.convert("RGB"))


def test_depth_has_one_scale_over_all_images(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Image.Image] = []
    monkeypatch.setattr(show_command, "_together", lambda given: rows.extend(given) or given[0])
    weights = folder / "dinov2_vits14_dd.safetensors"
    flags = ("--weights", weights, "--size", 56, "-o", tmp_path / "x.png")
    ran = run("show", "depth", folder / "a.png", folder / "b.png", *flags)
    assert (ran.status, ran.out, ran.err) == (0, "", f"dinov3-infer: wrote '{tmp_path / 'x.png'}'\n")
    head = load_head("dinov2_vits14_dd", weights=weights)
    maps = [head.predict(folder / name, 56)[0].depth for name in ("a.png", "b.png")]
    limits = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    for name, row, found in zip(("a.png", "b.png"), rows, maps, strict=True):
        np.testing.assert_array_equal(pixels(row), pixels(depth_picture(folder / name, found, limits)))


def test_a_large_image_is_made_smaller(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 768 pixels, unless its own size or another is asked for; small ones are not enlarged."""
    asked: list[object] = []
    monkeypatch.setattr(
        Depth, "predict", lambda _, images, size: asked.append(size) or [DepthMap(torch.ones(900, 1200), None)]
    )
    monkeypatch.setattr(show_command, "depth_picture", lambda *_: Image.new("RGB", (9, 9)))
    Image.fromarray(photo(900, 1200)).save(tmp_path / "large.png")
    common = ("--weights", folder / "dinov2_vits14_dd.safetensors", "-o", tmp_path / "x.png", "--overwrite")
    large = tmp_path / "large.png"
    for name, flags in ((large, ()), (folder / "a.png", ()), (large, ("--size", "own"))):
        assert run("show", "depth", name, *common, *flags).status == 0
    assert asked == [768, 80, None]


def test_frames_have_one_size(folder: Path, tmp_path: Path) -> None:
    """Whatever the length of their legends."""
    frames = [Image.fromarray(photo(60, 80, seed=seed)) for seed in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    flags = ("--weights", folder / f"{SEGMENTS}.safetensors", "--size", 56, "-o", tmp_path / "y.gif")
    assert run("show", "segments", tmp_path / "x.gif", *flags).status == 0
    with Image.open(tmp_path / "y.gif") as made:
        assert made.n_frames == 3  # type: ignore[attr-defined]
    rows = show_command._of_one_size([Image.new("RGB", (5, height), "red") for height in (3, 7)])
    assert [row.size for row in rows] == [(5, 7), (5, 7)] and rows[0].getpixel((0, 6)) == (255, 255, 255)


def test_segments_have_a_legend(folder: Path, tmp_path: Path) -> None:
    weights = folder / f"{SEGMENTS}.safetensors"
    ran = run("show", "segments", folder / "a.png", "--weights", weights, "--size", 56, "-o", tmp_path / "x.png")
    assert ran.status == 0
    (found,) = load_head(SEGMENTS, weights=weights).predict(folder / "a.png", 56)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), pixels(segments_picture(folder / "a.png", found)))


def test_wrong_use_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of another kind, variants that were not released, files that do not fit, sizes that are none."""
    image, out = folder / "a.png", ("-o", tmp_path / "x.png")
    depth, segments = folder / "dinov2_vits14_dd.safetensors", folder / f"{SEGMENTS}.safetensors"
    refused(1, "unknown head 'vits14'", "show", "depth", image, *out, "--head", "vits14")
    refused(1, f"{SEGMENTS} is of another kind, segments; give one for depth, such as 'dinov2_vit",
            "show", "depth", image, *out, "--head", SEGMENTS)  # fmt: skip
    refused(1, "dinov2_vits14_dd is of another kind, depth; give one for segments, such as 'dinov2_vit",
            "show", "segments", image, *out, "--head", "dinov2_vits14_dd")  # fmt: skip
    refused(1, r"dinov3_vitl16_chmv2 was released for one kind only, not for 'NYU'",
            "show", "depth", image, *out, "--head", "dinov3_vitl16_chmv2", "--dataset", "NYU")  # fmt: skip
    refused(1, r"was released for 'NYU' or 'KITTI', not for 4", "show", "depth", image, *out, "--layers", 4)
    refused(2, "argument --dataset: invalid choice: 'ade'", "show", "depth", image, *out, "--dataset", "ade")
    refused(1, "does not fit dinov2_vits14_dd: 56 missing", "show", "depth", image, *out, "--weights", segments)
    refused(1, f"does not fit {SEGMENTS}: ", "show", "segments", image, *out, "--weights", depth)
    refused(1, "size is the short side in pixels, from 14 to 2048, got 4096",
            "show", "segments", image, *out, "--weights", segments, "--size", 4096)  # fmt: skip
    refused(1, "size is the short side in pixels, from 14 to 2048, got .56, 70.",
            "show", "segments", image, *out, "--weights", segments, "--size", "56x70")  # fmt: skip
    refused(1, "takes one size, the long side", "show", "depth", image, *out, "--weights", depth, "--size", "56x70")
    refused(1, "sent by their owner to whoever accepts the licence .DINOv3 License.*give it with --weights$",
            "show", "depth", image, *out, "--head", "dinov3_vit7b16_dd")  # fmt: skip
    (tmp_path / "no.png").write_bytes(b"nothing")
    refused(1, "no.png' .* that Pillow can read", "show", "segments", tmp_path / "no.png", *out, "--weights", segments)
    refused(1, "should end in .png", "show", "segments", image, "-o", tmp_path / "x.txt", "--weights", segments)
    refused(2, "the following arguments are required: -o/--out", "show", "depth", image)
    assert not (tmp_path / "x.png").exists()


def test_variants_reach_the_call(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    head = load_head("dinov2_vits14_dd", weights=folder / "dinov2_vits14_dd.safetensors")
    monkeypatch.setattr(
        attach, "load_head", lambda name, _, weights, variant, device: asked.append((name, variant)) or head
    )
    for flags in (
        (), ("--dataset", "KITTI"), ("--head", "dinov2_vitb14_ld"), ("--head", "dinov2_vitb14_ld", "--layers", 1),
        ("--head", "dinov2_vitb14_ld", "--layers", 1, "--dataset", "KITTI"), ("--head", "dinov3_vitl16_chmv2"),
    ):  # fmt: skip
        assert run("show", "depth", folder / "a.png", "-o", tmp_path / "x.png", "--overwrite", *flags).status == 0
    assert asked == [
        ("dinov2_vits14_dd", "NYU"), ("dinov2_vits14_dd", "KITTI"), ("dinov2_vitb14_ld", ("NYU", 4)),
        ("dinov2_vitb14_ld", ("NYU", 1)), ("dinov2_vitb14_ld", ("KITTI", 1)), ("dinov3_vitl16_chmv2", None),
    ]  # fmt: skip
