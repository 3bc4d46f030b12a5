"""Numbered pictures of every origin, for embed and the trainer alike."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, ImageError, InputError, MissingFileError, load_image
from dinov3_infer.images.decode import decode
from dinov3_infer.images.opening import as_source, open_images
from dinov3_infer.images.paths import list_images, walk
from dinov3_infer.images.sources import Names, Source, chained
from dinov3_infer.train import open_data


def png(seed: int, size: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(*size, seed=seed)).save(stream, "PNG")
    return stream.getvalue()


CONTENT = [png(i) for i in range(7)]


def same(source: Source, contents: list[bytes]) -> bool:
    found = [source.load(i).image for i in range(len(source))]
    return len(found) == len(contents) and all(map(torch.equal, found, map(load_image, contents)))  # type: ignore[arg-type]


def write_tar(path: Path, contents: list[bytes] = CONTENT) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, content in enumerate(contents):
            info = tarfile.TarInfo(f"in/{i}.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_table(path: Path, column: str = "image", bare: bool = False, contents: Any = CONTENT) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = contents if bare else [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(contents)]
    pyarrow.parquet.write_table(pa.table({"label": [0] * len(rows), column: rows}), path, row_group_size=3)
    return path


@pytest.mark.parametrize(
    "make",
    [
        lambda p: write_tar(p / "a.tar"),
        lambda p: write_table(p / "a.parquet"),
        lambda p: write_table(p / "a.parquet", "picture", bare=True),
    ],
    ids=["tar", "table", "table of bytes"],
)
def test_containers(make: Any, tmp_path: Path) -> None:
    """Any picture by its number and in any order; sent to another process; taken by embed and by the trainer."""
    path = make(tmp_path)
    source = as_source(path)
    assert same(source, CONTENT) and torch.equal(source.load(6).image, load_image(CONTENT[6]))
    assert torch.equal(source.load(0).image, load_image(CONTENT[0]))
    assert same(pickle.loads(pickle.dumps(source)), CONTENT)
    assert source.key(2) == f"{path}#{'in/2.png' if path.suffix == '.tar' else 2}"
    assert torch.equal(open_data(path)[5], load_image(CONTENT[5]))
    bb = randomise(Backbone.from_config(SMALL["dinov3"]))
    assert np.array_equal(bb.embed(path, size=32), bb.embed(CONTENT, size=32))  # type: ignore[operator]
    listed = tmp_path / "l.txt"
    listed.write_text(f"{source.key(4)}\n{source.key(1)}\n")
    assert same(as_source(listed), [CONTENT[4], CONTENT[1]])
    listed.write_text(f"{path}#99\n")
    assert "no picture '99'" in complaint(MissingFileError, lambda: as_source(listed))


def test_hugging_face_datasets(tmp_path: Path) -> None:
    """In memory and saved to a folder; a bad picture is an error of its own."""
    datasets = pytest.importorskip("datasets")
    contents = [*CONTENT[:3], b"no picture"]
    rows = {"label": [0] * 4, "photo": [{"bytes": content, "path": None} for content in contents]}
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "saved")
    for source in (open_images(dataset), as_source(tmp_path / "saved")):
        assert isinstance(source, Source) and len(source) == 4
        assert torch.equal(source.load(1).image, load_image(CONTENT[1]))
        assert "item 3 of Dataset" in complaint(ImageError, lambda source=source: source.load(3))
    bb = randomise(Backbone.from_config(SMALL["dinov3"]))
    for given in (dataset, dataset.to_iterable_dataset()):
        rows = bb.embed(given, size=32, on_error="skip")  # type: ignore[operator]
        assert np.isnan(rows).all(axis=1).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p.write_bytes(b"PAR1" * 9), "is no whole Parquet file"),
        (lambda p: write_table(p, contents=["a", "b"], bare=True), "no pictures in"),
        (lambda p: write_table(p, contents=[]), "no pictures in"),
    ],
    ids=["damaged", "words", "empty"],
)
def test_tables_that_are_none(make: Any, said: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    make(tmp_path / "a.parquet")
    assert said in complaint(InputError, lambda: as_source(tmp_path / "a.parquet"))


def test_a_table_names_no_files(tmp_path: Path) -> None:
    """A row without bytes is not looked for on this machine."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "secret.png").write_bytes(CONTENT[0])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], kind)
    pyarrow.parquet.write_table(pa.table({"image": column}), tmp_path / "a.parquet")
    source = as_source(tmp_path / "a.parquet")
    assert "holds no bytes" in complaint(ImageError, lambda: source.load(0))


def test_patterns_lists_and_several_sources(tmp_path: Path) -> None:
    """A pattern may name archives; sources follow each other."""
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", CONTENT[3 * i : 3 * i + 3])
    (tmp_path / "6.png").write_bytes(CONTENT[6])
    assert same(as_source(tmp_path / "*.tar"), CONTENT[:6])
    both = chained([as_source(tmp_path / "*.tar"), as_source(tmp_path / "6.png")])
    assert same(both, CONTENT) and both.key(6) == str(tmp_path / "6.png")
    (tmp_path / "l.txt").write_text(f"6.png\n{tmp_path / '1.tar'}#in/0.png\n")
    assert same(as_source(tmp_path / "l.txt"), [CONTENT[6], CONTENT[3]])


def test_names_in_one_piece() -> None:
    names = ["a", "", "d/é.png", os.fsdecode(b"caf\xe9"), "x" * 300, "two\nlines"]
    assert list(Names(names)) == names and len(Names([])) == 0
    assert list(pickle.loads(pickle.dumps(Names(names)))) == names


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Into other folders, after all real ones; loops, links among each other and second names of a folder end."""
    for name in ("top/b/1.png", "top/a/2.png", "other/3.png", "other/deep/4.png", "top/.hidden/5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(CONTENT[0])
    for link, there in (("top/a/loop", "top"), ("top/a/again", "top/b"), ("top/there", "other"), ("other/back", "top"),
                        ("other/deep/self", "other/deep"), ("top/gone", "nowhere")):  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / there)
    top = str(tmp_path / "top")
    found = ["a/2.png", "b/1.png", "there/3.png", "there/deep/4.png"]
    assert [os.path.relpath(path, top) for path in list_images(top)] == found
    assert sorted(walk(top)) == sorted(os.path.join(top, name) for name in [*found, "gone"]), (
        "a link to no folder is a file"
    )


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of the shell that is not set."""
    (tmp_path / "a.png").write_bytes(CONTENT[0])
    monkeypatch.chdir(tmp_path)
    assert "empty path" in complaint(MissingFileError, lambda: as_source(""))


class Column:
    """A column of a data frame that was sorted: numbers are labels, and the order is that of `to_list`."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, label: int) -> str:
        return self._paths[-1 - label]

    def to_list(self) -> list[str]:
        return self._paths


def test_a_column_of_a_data_frame_keeps_its_order() -> None:
    source = open_images(Column(["b.png", "a.png"]))  # type: ignore[arg-type]
    assert isinstance(source, Source) and [source.key(i) for i in range(2)] == ["b.png", "a.png"]


# --- decoding smaller -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("fit, size", [("squash", 224), ("crop", 224), ("native", 400), ("pad", 224)])
def test_fast_decoding_stays_above_what_is_needed(fit: Any, size: int, turned: int, tmp_path: Path) -> None:
    """Upright, not below the size to come, placed as the whole picture is, and nearly the same pixels."""
    exif = Image.Exif()
    exif[274] = turned
    picture = Image.fromarray(photo(120, 200)).resize((2000, 1203), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    transform = Backbone.from_config("nano").preprocess.with_options(size, fit)

    def wanted(height: int, width: int) -> tuple[int, int]:
        return transform.plan(height, width).resized

    whole = load_image(tmp_path / "a.jpg")
    small, original = decode(str(tmp_path / "a.jpg"), "a", wanted)
    assert original == tuple(whole.shape[1:]) and small.shape[1] < whole.shape[1] // 2
    need = wanted(*original)
    assert small.shape[1] >= need[0] and small.shape[2] >= need[1]
    exact, placement = transform.place(whole)
    fast, placed = transform.place(small, original=original)
    assert placed == placement and fast.shape == exact.shape and (fast - exact).abs().mean() < 0.08
    assert decode((tmp_path / "a.jpg").read_bytes(), "a", wanted)[0].shape == small.shape


def test_fast_decoding_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    """Other formats, small JPEGs, and what is broken."""
    assert torch.equal(decode(CONTENT[0], "a", lambda h, w: (4, 4)).image, load_image(CONTENT[0]))
    stream = io.BytesIO()
    Image.fromarray(photo(60, 60)).save(stream, "JPEG")
    assert torch.equal(decode(stream.getvalue(), "a", lambda h, w: (50, 50)).image, load_image(stream.getvalue()))
    complaint(ImageError, lambda: decode(stream.getvalue()[:300], "a", lambda h, w: (4, 4)))
    complaint(MissingFileError, lambda: decode(str(tmp_path / "none.jpg"), "a", lambda h, w: (4, 4)))
