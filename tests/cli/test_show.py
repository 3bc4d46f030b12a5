"""`show`: the sheet holds the whole photographs, the maps lie at the right place, all images share one scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import refused, run, small_model, write_pictures
from PIL import Image
from repository import EXAMPLES

from dinov3_infer import Backbone
from dinov3_infer.cli import show as show_command
from dinov3_infer.tasks.overlay import overlay, panel
from dinov3_infer.tasks.pca import foreground, pca_picture, pca_rgb
from dinov3_infer.tasks.similarity import region_vector, similarity_map

CAT = EXAMPLES / "cat.jpg"  # 451 x 300
MODEL = ("-m", small_model(), "--device", "cpu", "--size", "160")


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained(small_model(), device="cpu")


def pixels(image: Image.Image | Path) -> np.ndarray:
    opened = Image.open(image) if isinstance(image, Path) else image
    return np.asarray(opened.convert("RGB"))


@pytest.mark.parametrize("kind", ["pca", "attention", "similarity"])
def test_one_image_is_itself_beside_its_map(kind: str, tmp_path: Path) -> None:
    flags = ("--point", "180,120") if kind == "similarity" else ()
    ran = run("show", kind, CAT, "-o", tmp_path / "x.png", *MODEL, *flags)
    assert (ran.status, ran.out, ran.err) == (0, "", f"dinov3-infer: wrote '{tmp_path / 'x.png'}'\n")
    found, photograph = pixels(tmp_path / "x.png"), pixels(panel(CAT))
    height, width = photograph.shape[:2]
    assert found.shape == (height + 16, 2 * width + 24, 3)
    np.testing.assert_array_equal(found[8 : 8 + height, 8 : 8 + width], photograph)
    beside = found[8 : 8 + height, 16 + width : 16 + 2 * width]
    assert beside.std() > 10 and np.abs(beside.astype(int) - photograph).mean() > 10


def test_pca_is_that_of_all_images_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bb: Backbone) -> None:
    other = write_pictures(tmp_path, "a.png") / "a.png"
    rows: list[Image.Image] = []
    monkeypatch.setattr(show_command, "_together", lambda given: rows.extend(given) or given[0])
    for flags in ((), ("--foreground",)):
        assert run("show", "pca", CAT, other, "-o", tmp_path / "x.png", *MODEL, "--overwrite", *flags).status == 0
        features = [bb.extract_features(p, size=160, fit="native") for p in (CAT, other)]
        colours = pca_rgb(features, foreground(features) if flags else None)
        for path, one, row in zip((CAT, other), colours, rows[-2:], strict=True):
            np.testing.assert_array_equal(pixels(row), pixels(pca_picture(path, one)))


def test_attention_of_a_point_and_of_heads(tmp_path: Path, bb: Backbone) -> None:
    for name, flags in (("cls", ()), ("point", ("--point", "100,50")), ("layer", ("--layer", "-3"))):
        assert run("show", "attention", CAT, "-o", tmp_path / f"{name}.png", *MODEL, *flags).status == 0
    maps = {
        "cls": bb.attention_maps(CAT, size=160),
        "point": bb.attention_maps(CAT, size=160, query=(100, 50)),
        "layer": bb.attention_maps(CAT, layer=-3, size=160),
    }
    for name, found in maps.items():
        mean = found[0].mean(dim=0)
        limits = float(mean.min()), float(np.quantile(mean, 0.995))
        expected = overlay(CAT, mean, limits=limits, mark=(100, 50) if name == "point" else None)
        shown = pixels(tmp_path / f"{name}.png")[8 : 8 + expected.height, 16 + expected.width : -8]
        np.testing.assert_array_equal(shown, pixels(expected), err_msg=name)
    assert run("show", "attention", CAT, "-o", tmp_path / "heads.png", *MODEL, "--heads").status == 0
    one, heads = (Image.open(tmp_path / f"{name}.png") for name in ("cls", "heads"))
    assert heads.width * heads.height > 2 * one.width * one.height  # the image, the mean and three heads


def test_similarity_has_one_scale_over_all_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bb: Backbone
) -> None:
    dark = tmp_path / "dark.png"
    Image.new("RGB", (300, 200), (5, 5, 5)).save(dark)
    rows: list[Image.Image] = []
    monkeypatch.setattr(show_command, "_together", lambda given: rows.extend(given) or given[0])
    flags = ("--point", "180,120", "--fit", "pad")
    assert run("show", "similarity", CAT, dark, "-o", tmp_path / "x.png", *MODEL, *flags).status == 0
    features = [bb.extract_features(p, size=160, fit="pad") for p in (CAT, dark)]
    vector = region_vector(features[0], point=(180, 120))
    maps = [similarity_map(f, vector)[0] for f in features]
    seen = torch.cat([m[f.valid[0]] for m, f in zip(maps, features, strict=True)])  # type: ignore[index]
    for i, path in enumerate((CAT, dark)):
        limits, mark = (float(seen.min()), float(seen.max())), (180.0, 120.0) if i == 0 else None
        expected = overlay(path, maps[i], features[i].placements[0], limits=limits, mark=mark)
        shown = pixels(rows[i])[8 : 8 + expected.height, 16 + expected.width : -8]
        np.testing.assert_array_equal(shown, pixels(expected))


@pytest.mark.parametrize(
    ("heights", "places", "size"),
    [
        ([100, 50], [(0, 0), (0, 100)], (300, 150)),
        ([30, 20, 10, 40], [(0, 0), (0, 30), (0, 50), (0, 60)], (300, 100)),
        ([90, 10, 20, 10, 80, 10, 30],
         [(0, 0), (300, 0), (300, 10), (300, 30), (300, 40), (0, 90), (0, 100)], (600, 130)),
    ],
    ids=["two", "four", "seven in two columns"],
)  # fmt: skip
def test_rows_have_one_width_and_no_holes(
    heights: list[int], places: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Each row goes to the shortest column."""
    rows = [Image.new("RGB", (300 * (1 + i), h * (1 + i)), (i, 0, 0)) for i, h in enumerate(heights)]
    made = show_command._together(rows)
    assert made.size == size
    for i, ((x, y), height) in enumerate(zip(places, heights, strict=True)):
        assert (pixels(made)[y : y + height, x : x + 300] == (i, 0, 0)).all(), i
    assert show_command._together(rows[:1]) is rows[0]


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    write_pictures(tmp_path, "a.png", "broken.png", *(f"many/{i}.png" for i in range(65)))
    out = ("-o", tmp_path / "x.png", *MODEL)
    refused(1, "65 images do not fit on one sheet; give 64 at most", "show", "pca", tmp_path / "many", *out)
    refused(1, "cannot decode", "show", "pca", tmp_path / "a.png", tmp_path / "broken.png", *out)
    refused(1, r"point \(x=900, y=9\) is outside", "show", "similarity", CAT, *out, "--point", "900,9")
    refused(1, "layer 9 does not exist", "show", "attention", CAT, *out, "--layer", "9")
    assert not (tmp_path / "x.png").exists()


def test_frames_of_an_animation(tmp_path: Path) -> None:
    """A GIF gives a GIF of the same frames with shared colours, or a sheet; a single frame is an image."""
    frames = [Image.open(CAT).convert("RGB").crop((10 * i, 0, 10 * i + 96, 64)) for i in range(3)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "one.gif")
    assert run("show", "pca", tmp_path / "x.gif", "-o", tmp_path / "y.gif", *MODEL).status == 0
    with Image.open(tmp_path / "y.gif") as made:
        assert made.n_frames == 3 and made.width > 1000  # type: ignore[attr-defined]
    assert run("show", "pca", tmp_path / "x.gif", "-o", tmp_path / "y.png", *MODEL).status == 0
    with Image.open(tmp_path / "y.png") as sheet_of_three:
        assert sheet_of_three.height > 3 * 300
    refused(1, "should end in .png or", "show", "pca", tmp_path / "one.gif", "-o", tmp_path / "z.gif", *MODEL)
    for name, content in (("text.gif", b"no image"), ("half.gif", (tmp_path / "x.gif").read_bytes()[:200])):
        (tmp_path / name).write_bytes(content)
        ran = refused(1, name, "show", "pca", tmp_path / name, "-o", tmp_path / "z.png", *MODEL)
        assert "a bug in dinov3-infer" not in ran.err


def test_frames_of_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width, stream.height = 96, 64
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 40 * i, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    assert run("show", "pca", tmp_path / "x.mp4", "-o", tmp_path / "y.webp", *MODEL).status == 0
    with Image.open(tmp_path / "y.webp") as made:
        assert made.n_frames == 4  # type: ignore[attr-defined]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = ("-o", tmp_path / "z.png")
    refused(1, "holds no frames that can be read", "show", "pca", tmp_path / "broken.mp4", *out, *MODEL)
