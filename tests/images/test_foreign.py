"""Errors for files that are no images, or images of a kind that Pillow does not know, state what the file is."""

import gzip
import io
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import CONTENT
from pictures import complaint, photo
from PIL import Image, ImageFile

from dinov3_infer.cli.main import main
from dinov3_infer.errors import ImageError, InputError
from dinov3_infer.images.decode import load_image
from dinov3_infer.images.opening import as_source


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.png", CONTENT[0])
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(CONTENT[0])
        archive.addfile(info, io.BytesIO(CONTENT[0]))
    return stream.getvalue()


def numpy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, photo(4, 5))
    return stream.getvalue()


OTHERS: dict[str, tuple[bytes, str]] = {
    "photos.zip": (zipped(), "zip archive"),
    "photos.tar.gz": (gzip.compress(tarred()), "compressed"),
    "photos.tgz": (gzip.compress(tarred()), "compressed"),
    "photos.csv": (b"path,label\na.png,cat\n", "text"),
    "photos.jsonl": (b'{"path": "a.png"}\n', "text"),
    "a.npy": (numpy(), "numpy array"),
    "a.h5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 600, "HDF5"),
    "film.mp4": (b"\0\0\0\x20ftypisom" + b"\0" * 600, "video"),
    "film.webm": (b"\x1aE\xdf\xa3" + b"\0" * 600, "video"),
    "a.pdf": (b"%PDF-1.7\n", "PDF"),
    "a.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "drawing"),
    "scan": (b"\0" * 128 + b"DICM" + b"\0" * 400, "DICOM"),
    "notes": ("Grüße\nan alle\n".encode(), "text"),
    "page": (b"<!DOCTYPE html><html>log in</html>", "page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "archive": (tarred(), "tar archive"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_before_anything_is_written(name: str, tmp_path: Path, capsys: Any) -> None:
    content, what = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    text = complaint(ImageError, lambda: load_image(tmp_path / name))
    assert what in text and "convert it to PNG" not in text and "damaged" not in text
    assert name in complaint(InputError, lambda: as_source(tmp_path / name))
    assert main(["embed", str(tmp_path / name), "-o", str(tmp_path / "out.npy"), "--device", "cpu"]) == 1
    assert not list(tmp_path.glob("out*")) and name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["photos.zip", "photos.tar.gz"])
def test_archives_among_images_are_refused_too(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(OTHERS[name][0])
    (tmp_path / "a.png").write_bytes(CONTENT[0])
    given = [str(tmp_path / "a.png"), str(tmp_path / name)]
    assert main(["embed", *given, "-o", str(tmp_path / "out.npy"), "--device", "cpu"]) == 1
    assert not list(tmp_path.glob("out*"))


def test_a_text_among_images_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("two words")
    (tmp_path / "a").write_bytes(CONTENT[0])
    given = [str(tmp_path / "a"), str(tmp_path / "notes.md")]
    assert main(["embed", *given, "-o", str(tmp_path / "out.npy"), "--device", "cpu"]) == 3
    assert np.isnan(np.load(tmp_path / "out.npy")).any(axis=1).tolist() == [False, True]


def bitmap_of_10_bits() -> bytes:
    masks = struct.pack("<3I", 0x3FF00000, 0x000FFC00, 0x000003FF)
    head = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 32, 3, 256, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<IHHI", 322, 0, 0, 66) + head + masks + b"\0" * 256


def jpeg_of_12_bits() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(16, 16)).save(stream, "jpeg")
    content = bytearray(stream.getvalue())
    content[content.index(b"\xff\xc0") + 4] = 12
    return bytes(content)


def tiff_of_bands(bands: int) -> bytes:
    tags = [
        (256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200),
        (277, 3, 1, bands), (278, 3, 1, 8), (279, 4, 1, 64 * bands), (284, 3, 1, 1),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return head.ljust(200, b"\0") + bytes(64 * bands)


@pytest.mark.parametrize("make", [bitmap_of_10_bits, jpeg_of_12_bits, lambda: tiff_of_bands(7)])
def test_a_kind_that_pillow_does_not_know_is_not_called_damaged(make: Any) -> None:
    text = complaint(ImageError, lambda: load_image(make()))
    assert "a format that Pillow does not read (" in text and "damaged" not in text


def test_many_bands_name_the_way_out() -> None:
    assert "red, green and blue bands as an array" in complaint(ImageError, lambda: load_image(tiff_of_bands(7)))


def test_a_file_cut_short_is_called_damaged() -> None:
    for content in (CONTENT[0][:200], CONTENT[0][:20]):
        assert "damaged" in complaint(ImageError, lambda content=content: load_image(content)) or len(content) == 20


# Plugins

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100
JXL = b"\xff\x0a" + b"\0" * 100


class Plugged(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self) -> None:
        self._size, self._mode = (5, 4), "RGB"
        self.tile = []

    def load(self) -> Any:
        self.im = Image.new("RGB", (5, 4), "red").im
        return Image.Image.load(self)


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plugin is registered, and none can be imported."""
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    for name in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("unplugged")
@pytest.mark.parametrize(("content", "package"), [(HEIC, "pillow-heif"), (JXL, "pillow-jxl-plugin")])
def test_the_plugin_is_named(content: bytes, package: str) -> None:
    assert f"pip install {package}" in complaint(ImageError, lambda: load_image(content))


@pytest.mark.usefixtures("unplugged")
def test_a_plugin_that_is_installed_registers_itself_at_the_first_file(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = types.ModuleType("pillow_heif")

    def register() -> None:
        monkeypatch.setitem(Image.OPEN, "HEIF", (Plugged, lambda prefix: prefix[4:12] == b"ftypheic"))

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    for _ in range(2):
        assert torch.equal(load_image(HEIC), load_image(Image.new("RGB", (5, 4), "red")))
