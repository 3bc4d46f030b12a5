"""`embed`: one row per image in input order, as an array or as complete files."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, ImageError, InputError, MissingFileError
from dinov3_infer.features.disk import formats
from dinov3_infer.features.disk.formats import FORMATS
from dinov3_infer.features.disk.lists import listed_in, write_list
from dinov3_infer.features.disk.store import Store
from dinov3_infer.model.cpu.linear import why_not_int8, why_not_packed
from dinov3_infer.model.dispatch import drop_plan

SIZES = [(64, 64), (64, 96), (50, 70), (33, 120), (20, 20)]
PICTURES = [photo(*size, seed=i) for i, size in enumerate(SIZES)]
BROKEN = b"GIF89a"


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


@pytest.mark.parametrize("pooling, width", [("cls", 64), ("mean", 64), ("cls_mean", 128)])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_rows_are_embeddings_in_order(pooling: Any, width: int, batch_size: int, bb: Backbone) -> None:
    """Each row equals, bit for bit, the embedding of that image alone."""
    rows = bb.embed(PICTURES, size=64, pooling=pooling, batch_size=batch_size)
    assert rows.shape == (5, width) and rows.dtype == np.float32
    for row, picture in zip(rows, PICTURES, strict=True):
        assert np.array_equal(row, bb.extract_features(picture, size=64, pooling=pooling).embedding[0].numpy())


@pytest.mark.parametrize("kind, shape", [("patches", (16, 64)), ("map", (64, 4, 4))])
def test_dense_rows(kind: Any, shape: tuple[int, ...], bb: Backbone) -> None:
    rows = bb.embed(PICTURES, size=64, kind=kind)
    assert rows.shape == (5, *shape) and rows.dtype == np.float32
    features = bb.extract_features(PICTURES[3], size=64)
    assert np.array_equal(rows[3], (features.patch_tokens if kind == "patches" else features.feature_map)[0].numpy())


@pytest.mark.parametrize("kind, axis", [("embedding", 0), ("patches", 1), ("map", 0)])
def test_normalize_makes_every_vector_of_length_one(kind: Any, axis: int, bb: Backbone) -> None:
    rows = [bb.embed(PICTURES[:2], size=64, kind=kind, normalize=n) for n in (False, True)]
    lengths = np.linalg.norm(rows[0], axis=axis + 1, keepdims=True)
    assert np.abs(rows[0] / lengths - rows[1]).max() < 1e-6 and not np.allclose(lengths, 1)


def test_an_iterator_of_unknown_length(bb: Backbone) -> None:
    """The iterator yields more images than the array first has room for."""
    pictures = [photo(32, 32, seed=i) for i in range(4)] * 40
    rows = bb.embed(iter(pictures), size=32)
    assert rows.shape == (160, 64) and np.array_equal(rows, bb.embed(pictures, size=32))
    assert not np.isnan(rows).any() and np.array_equal(rows[:4], rows[-4:])


def test_failures_keep_their_row(bb: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    """Failures leave NaN at the front, in the middle and at the end; one log line counts and explains them."""
    images = [BROKEN, PICTURES[0], "gone.png", PICTURES[1], BROKEN, BROKEN]
    rows = bb.embed(images, size=64, on_error="skip")
    assert np.isnan(rows).all(axis=1).tolist() == [True, False, True, False, True, True]
    assert np.array_equal(rows[[1, 3]], bb.embed(PICTURES[:2], size=64))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("4 of 6 images could not be read and have a row of NaN: ") and said.endswith("; ...")
    assert "item 0" in said and "gone.png" in said and said.count("item 5") == 0
    assert np.isnan(bb.embed(iter([PICTURES[0], *[BROKEN] * 70]), size=64, on_error="skip")[1:]).all()


@pytest.mark.parametrize("images, shape", [([], (0, 128)), ([BROKEN] * 3, (3, 128))], ids=["none", "all broken"])
def test_no_vector_at_all(images: list[bytes], shape: tuple[int, ...], bb: Backbone) -> None:
    """If every image fails, the array still has the usual shape."""
    rows = bb.embed(images, pooling="cls_mean", on_error="skip")
    assert rows.shape == shape and np.isnan(rows).all()


def test_a_bad_image_is_an_error_by_default(bb: Backbone) -> None:
    assert "item 1" in complaint(ImageError, lambda: bb.embed([PICTURES[0], BROKEN], size=64))


def test_maps_of_unequal_shape_are_said(bb: Backbone) -> None:
    text = complaint(InputError, lambda: bb.embed(PICTURES, kind="map", fit="native"))
    assert "item 1" in text and "[64, 4, 6]" in text and "fit='squash'" in text
    assert bb.embed(PICTURES, fit="native").shape == (5, 64)  # one vector each, whatever the size
    text = complaint(InputError, lambda: bb.embed([BROKEN], kind="map", on_error="skip"))
    assert "none of the 1 images" in text


# --- files --------------------------------------------------------------------------------------------------------


def test_files_and_report(bb: Backbone, tmp_path: Path) -> None:
    """The rows equal those without `out`; the files beside them describe each row."""
    for i, picture in enumerate(PICTURES[:2]):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    images = [tmp_path / "0.png", BROKEN, str(tmp_path / "1.png"), tmp_path / "gone.png"]
    report = bb.embed(images, tmp_path / "x.npy", size=64, on_error="skip")
    rows, lines = np.load(tmp_path / "x.npy"), (tmp_path / "x.jsonl").read_text().splitlines()
    assert np.array_equal(rows, bb.embed(images, size=64, on_error="skip"), equal_nan=True)
    listed = [json.loads(line) for line in lines]
    assert [x["row"] for x in listed] == [0, 1, 2, 3]
    assert [x["path"] for x in listed] == [str(tmp_path / "0.png"), None, str(tmp_path / "1.png"), str(images[3])]
    assert [bool(x["error"]) for x in listed] == [False, True, False, True] and "item 1" in listed[1]["error"]
    assert report.path == tmp_path / "x.npy" and report.shape == (4, 64) and report.batch_size == 32
    assert [(f.row, f.path) for f in report.failures] == [(1, None), (3, str(images[3]))]
    assert [x["grid"] for x in listed] == [[4, 4], None, [4, 4], None]
    assert sorted(os.listdir(tmp_path)) == ["0.png", "1.png", "x.json", "x.jsonl", "x.npy"]


def test_nothing_is_left_of_a_run_that_fails(bb: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable image and a full disk leave no files."""
    with pytest.raises(ImageError):
        bb.embed([BROKEN], tmp_path / "x.npy")
    assert os.listdir(tmp_path) == []

    def full(stream: Any, vectors: Any) -> None:
        stream.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(formats, "_append", full)
    with pytest.raises(OSError, match="no space left"):
        bb.embed(PICTURES, tmp_path / "x.npy", size=64)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "out, error, said",
    [
        ("x.csv", InputError, "x.csv' should end in .npy, .safetensors, .parquet, or be a folder"),
        ("here.npy", InputError, "here.npy' exists already"), ("list.npy", InputError, "list.jsonl' exists already"),
        ("photos", InputError, "holds other files"), ("here.npy/", InputError, "is a file, but a folder is needed"),
        ("none/x.npy", MissingFileError, "none' to write 'x.npy'"),
    ],
)  # fmt: skip
def test_wrong_targets_are_said_first(out: str, error: Any, said: str, bb: Backbone, tmp_path: Path) -> None:
    """A wrong target raises before an image is read, and existing files stay."""
    (tmp_path / "here.npy").write_bytes(b"precious")
    (tmp_path / "list.jsonl").write_bytes(b"precious")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").touch()
    assert said in complaint(error, lambda: bb.embed([BROKEN], f"{tmp_path}/{out}"))
    assert (tmp_path / "here.npy").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(kind="vectors"), "kind is one of embedding, patches, map; got 'vectors'"),
        (dict(pooling="max"), "'max'"), (dict(on_error=None), "got None"), (dict(batch_size=0), "got 0"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_said(options: dict[str, Any], said: str, bb: Backbone) -> None:
    assert said in complaint(InputError, lambda: bb.embed(PICTURES, **options))


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_name_is_found_again(suffix: str, bb: Backbone, tmp_path: Path) -> None:
    """Names that are not UTF-8, and names that look like their escaped form, survive files of vectors and lists."""
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    folder = tmp_path / "album"
    folder.mkdir()
    names = [
        os.fsdecode(b"caf\xe9.png"),
        r"caf\xe9.png",
        r"caf\x5cxe9.png",
        "a\nb.png",
        "caf\u00e9.png",
        os.fsdecode(b"\\\xff.png"),
    ]
    for name in names:
        Image.fromarray(photo(20, 20)).save(folder / name)
    expected = sorted(str(folder / name) for name in names)
    out = tmp_path / f"x{suffix}"
    for resumed in (0, 6):
        report = bb.embed(folder, out, size=32)
        assert report.resumed == resumed and not report.failures
        assert list(Store(out).paths) == expected
    assert write_list(tmp_path / "kept.txt", Store(out).paths) == 6
    assert listed_in(Store(out), tmp_path / "kept.txt").all()
    again = bb.embed(tmp_path / "kept.txt", tmp_path / f"y{suffix}", size=32)
    assert not again.failures and list(Store(tmp_path / f"y{suffix}").paths) == expected


@pytest.mark.planned
@pytest.mark.parametrize("mode", ["exact", "fast", "int8"])
def test_the_record_says_which_mode_was_in_effect(mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record holds the mode that ran, which may differ from the mode that was asked for."""
    fast = Backbone.from_pretrained("nano", device="cpu", mode=mode)
    fast.embed([photo(20, 20)], tmp_path / "x.npy", size=32)
    here = {"exact": None, "fast": why_not_packed(torch.bfloat16), "int8": why_not_int8()}[mode] is None
    recorded = Store(tmp_path / "x.npy").recipe.dtype
    assert recorded == ("float32" if mode == "exact" else f"float32, mode {mode}") or not here
    monkeypatch.setattr("dinov3_infer.model.dispatch.why_not_int8", lambda: "no such CPU")
    monkeypatch.setattr("dinov3_infer.model.dispatch.why_not_packed", lambda dtype=None: dtype and "no such CPU")
    drop_plan(fast)
    fast.embed([photo(20, 20)], tmp_path / "y.npy", size=32)
    assert Store(tmp_path / "y.npy").recipe.dtype == "float32"


@pytest.mark.parametrize("progress, shown", [(True, True), (False, False), (None, False)])
def test_progress_is_on_stderr(progress: bool | None, shown: bool, bb: Backbone, capfd: Any) -> None:
    """progress=None shows no bar here, because stderr is not a terminal."""
    bb.embed(PICTURES, size=32, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("5/5" in err) is shown


def test_the_batch_that_did_is_reported(bb: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = bb.forward

    def tight(pixels: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(pixels, *args, **options)

    monkeypatch.setattr(bb, "forward", tight)
    assert bb.embed(PICTURES, tmp_path / "x.npy", size=64).batch_size == 2
