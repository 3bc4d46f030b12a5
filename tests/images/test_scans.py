"""A bound on the work of JPEGs with many scans."""

import io
import struct
import time
from pathlib import Path

import pytest
import torch
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import ImageError, load_image
from dinov3_infer.images import scans
from dinov3_infer.images.decode import decode


def jpeg(mode: str = "RGB", side: int = 64, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(photo(side, side)).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def bomb(mode: str, side: int, count: int, which: str) -> bytes:
    """A JPEG that claims `side` x `side` pixels, and repeats one of its scans."""
    content = bytearray(jpeg(mode, progressive=True))
    at = content.index(b"\xff\xc2")
    content[at + 5 : at + 9] = struct.pack(">HH", side, side)
    places = [i for i in range(len(content)) if content[i : i + 2] == b"\xff\xda"]
    first, end = (places[0], places[1]) if which == "first" else (places[-1], len(content) - 2)
    scan = bytes(content[first:end])
    scan = scan[: max(scan.find(b"\xff", 2), 0) or None]  # without tables of the next
    return bytes(content[:-2]) + scan * count + b"\xff\xd9"


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize(
    "mode, side, count",
    [("RGB", 9000, 2000), ("L", 9000, 500), ("RGB", 5000, 900), ("CMYK", 4000, 5000), ("RGB", 64, 50_000)],
)
def test_many_scans_are_refused_at_once(mode: str, side: int, count: int, which: str, tmp_path: Path) -> None:
    """Bytes, files, streams and reduced decoding are covered."""
    content = bomb(mode, side, count, which)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    started = time.process_time()
    for source in (content, path, io.BytesIO(content)):
        assert "scans" in complaint(ImageError, lambda source=source: load_image(source))
    assert "scans" in complaint(ImageError, lambda: decode(content, "it", lambda height, width: (32, 32)))
    assert time.process_time() - started < 3


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_what_people_have_is_read(mode: str, progressive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """JPEGs with a thumbnail, and with as many scans as common tools write, are read."""
    exif = Image.Exif()
    exif[0x010E] = "\u00ff\u00da" * 5000  # the marker of a scan where none is, in UTF-8 and below as bytes
    content = jpeg(mode, progressive=progressive, exif=exif.tobytes() + jpeg(side=24) * 3)
    with Image.open(io.BytesIO(content)) as whole:
        expected = torch.tensor(list(whole.convert("RGB").tobytes()), dtype=torch.uint8).view(64, 64, 3)
    assert torch.equal(load_image(content).permute(1, 2, 0), expected)
    monkeypatch.setattr(scans, "MOST", 3)
    assert progressive == ("more than 3 scans" in _said(content))


def test_a_marker_on_the_border_of_two_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(progressive=True)
    count = content.count(b"\xff\xda")
    for chunk in (1, 2, 3, 7, 4096):
        monkeypatch.setattr(scans, "_CHUNK", chunk)
        assert scans._holds_more(io.BytesIO(content), count - 1) and not scans._holds_more(io.BytesIO(content), count)


def _said(content: bytes) -> str:
    try:
        load_image(content)
    except ImageError as error:
        return str(error)
    return ""
