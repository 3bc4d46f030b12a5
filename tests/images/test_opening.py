"""Every command and method finds the same images."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import CONTENT, same, write_tar
from oracles import SMALL, randomise
from pictures import complaint

from dinov3_infer import Backbone, InputTypeError, MissingFileError, list_images
from dinov3_infer.images.opening import as_source, each_image, find_images, open_images
from dinov3_infer.images.paths import FORMATS
from dinov3_infer.images.sources import Source, chained, relative_names
from dinov3_infer.train import open_data


def test_patterns_lists_and_several_sources(tmp_path: Path) -> None:
    """A pattern may match archives, and several sources keep their order."""
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", CONTENT[3 * i : 3 * i + 3])
    (tmp_path / "6.png").write_bytes(CONTENT[6])
    assert same(as_source(tmp_path / "*.tar"), CONTENT[:6])
    both = chained([as_source(tmp_path / "*.tar"), as_source(tmp_path / "6.png")])
    assert same(both, CONTENT) and both.key(6) == str(tmp_path / "6.png")
    (tmp_path / "l.txt").write_text(f"6.png\n{tmp_path / '1.tar'}#in/0.png\n")
    assert same(as_source(tmp_path / "l.txt"), [CONTENT[6], CONTENT[3]])


def test_an_empty_path_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset shell variable gives an empty path."""
    (tmp_path / "a.png").write_bytes(CONTENT[0])
    monkeypatch.chdir(tmp_path)
    assert "empty path" in complaint(MissingFileError, lambda: as_source(""))


class Column:
    """A column of a sorted data frame: its index gives labels, and `to_list` the order."""

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


@pytest.mark.parametrize("kind", ["U", "O"])
def test_an_array_of_paths_is_a_list_of_them(kind: str) -> None:
    """A table column of paths."""
    assert each_image(np.array(["a.png", "b.png"], kind)) == ["a.png", "b.png"]


def test_a_dictionary_is_no_list_of_images() -> None:
    assert "dict" in complaint(InputTypeError, lambda: each_image({"a.jpg": 1}))


def keys(source: Any) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_every_door_takes_the_same_files(tmp_path: Path) -> None:
    """The library, the trainer and the commands find the same images in a folder."""
    suffixes = [suffix for found in FORMATS.values() for suffix in found]
    for i, suffix in enumerate(suffixes):
        path = tmp_path / f"set/{i % 3}/{i:02}{suffix.upper() if i % 2 else suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[0])
    for name in ("0/a.eps", "1/b.psd", "2/c.npy", "0/none", ".d.png", "0/.e/f.png"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(CONTENT[0])
    folder = tmp_path / "set"
    expected = sorted(str(path) for path in folder.rglob("*") if path.stem.isdecimal() and path.is_file())
    assert len(expected) == len(suffixes) > 20
    data = open_data(folder)
    assert expected == list_images(folder) == keys(open_images(folder)) == keys(as_source(str(folder)))
    assert expected == keys(find_images([str(folder)])) == keys(data.sources[0])
    assert data.classes == ["0", "1", "2"] and find_images([str(folder)]).labels == data.sources[0].labels
    bb = randomise(Backbone.from_config(SMALL["dinov3"]))
    assert np.isfinite(bb.embed(folder, size=32)).all() and len(bb.embed(folder, size=32)) == len(expected)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(folder, "set", filter=lambda info: None if "/." in info.name else info)
    assert len(as_source(tmp_path / "set.tar")) == len(expected)


def test_several_sources_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources keep their order; an image has its number among all, and its name below the given folder."""
    write_tar(tmp_path / "a.tar", CONTENT[:2])
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/b.png").write_bytes(CONTENT[2])
    for name in ("c.png", "d", "@e.png"):
        (tmp_path / name).write_bytes(CONTENT[3])
    (tmp_path / "l.lst").write_text("c.png\n")
    monkeypatch.chdir(tmp_path)
    source = find_images(["c.png", "d", "in", "a.tar", "l.lst", "@l.lst", "./@e.png"])
    expected = ["c.png", "d", "in/deep/b.png", "a.tar#in/0.png", "a.tar#in/1.png", "c.png", "c.png", "./@e.png"]
    assert keys(source) == expected
    assert relative_names(source) == ["c", "d", "deep/b", "a.tar#in/0", "a.tar#in/1", "c", "c", "@e"]
    assert [source.label(i) for i in (1, 2, 3, 7)] == ["item 1", "item 2", "'a.tar#in/0.png'", "item 7"]
    assert keys(as_source("*")) == ["@e.png", *expected[3:5], "c.png", "d", "c.png"]
