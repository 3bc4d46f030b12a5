"""Images with more than 8 bits: the values of the file with levels, an error without, never near-black pixels."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, Preprocess
from dinov3_infer.errors import ImageError, InputError
from dinov3_infer.images.decode import load_image
from dinov3_infer.images.levels import as_levels

COLOURS = photo(24, 32)
DEEP = COLOURS.astype(np.uint16) * 257 - (COLOURS > 100) * np.uint16(77)  # whose low bytes matter
GREY = DEEP[..., 0]


def png(values: np.ndarray) -> bytes:
    """A 16-bit PNG of an array [H, W], [H, W, 3] or [H, W, 4]."""
    height, width, *bands = values.shape
    kind = {(): 0, (3,): 2, (4,): 6}[tuple(bands)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, *, order: str = "<", planes: bool = False, packed: bool = False, **tags: int) -> bytes:
    """A TIFF, uncompressed or deflated, with one strip or one plane per colour."""
    height, width = values.shape[:2]
    bands = values.shape[2] if values.ndim == 3 else 1
    bits = values.dtype.itemsize * 8
    parts = [values[..., band] for band in range(bands)] if planes and values.ndim == 3 else [values]
    strips = [part.astype(values.dtype.newbyteorder(order)).tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    fields: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (bits,) * bands, 259: (8 if packed else 1,), 262: (2 if bands > 2 else 1,),
        273: (0,) * len(strips), 277: (bands,), 278: (height,), 279: tuple(map(len, strips)),
        284: (2 if planes else 1,),
    }  # fmt: skip
    fields |= {int(name[1:]): (value,) for name, value in tags.items()}
    size = 8 + 2 + 12 * len(fields) + 4
    extra, places = b"", []
    for strip in strips:
        places.append(size + len(extra))
        extra += strip + b"\0" * (len(strip) % 2)
    fields[273] = tuple(places)
    entries = b""
    for tag, found in sorted(fields.items()):
        kind, form = (4, "I") if tag in (273, 279) else (3, "H")
        content = struct.pack(f"{order}{len(found)}{form}", *found)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", size + len(extra)), extra + content
        entries += struct.pack(f"{order}HHI", tag, kind, len(found)) + content.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(fields)) + entries + b"\0" * 4 + extra


def shown(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def wanted(values: np.ndarray, low: float, high: float) -> np.ndarray:
    found = ((values.astype(np.float64) - low) / (high - low)).clip(0, 1)
    return found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=2)


FILES: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": png,
    "tiff": tiff,
    "tiff, other byte order": lambda v: tiff(v, order=">"),
    "tiff, deflated": lambda v: tiff(v, packed=True),
    "tiff, deflated, other order": lambda v: tiff(v, packed=True, order=">"),
}


@pytest.mark.parametrize("values", [GREY, DEEP], ids=["grey", "colours"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("levels", [(0, 65535), (1000, 40000), "full", "percentile"], ids=str)
def test_all_16_bits_of_a_file_count(name: str, values: np.ndarray, levels: Any) -> None:
    low, high = np.percentile(values, (0.5, 99.5)) if levels == "percentile" else (0, 65535)
    low, high = (low, high) if isinstance(levels, str) else levels
    found = load_image(FILES[name](values), levels=levels)
    assert found.dtype == torch.float32 and found.stride(0) == 1
    assert np.abs(shown(found) - wanted(values, low, high)).max() < 1e-6


@pytest.mark.parametrize("name", FILES)
def test_colours_of_12_bits_in_16_are_refused_without_levels_and_right_with_them(name: str) -> None:
    values = DEEP >> 4
    text = complaint(ImageError, lambda: load_image(FILES[name](values)))
    assert f"16-bit colours up to {values.max()} of 65535" in text and "levels=" in text and "--levels" in text
    assert np.abs(shown(load_image(FILES[name](values), levels=(0, 4095))) - wanted(values, 0, 4095)).max() < 1e-6


@pytest.mark.parametrize("name", FILES)
def test_colours_that_fill_16_bits_are_what_they_were(name: str) -> None:
    """Without levels the pixels are the high bytes, as in Pillow, and black stays black."""
    assert np.array_equal(shown(load_image(FILES[name](DEEP))), DEEP >> 8)
    assert not load_image(FILES[name](DEEP * 0)).any()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_grey_ones_are_turned_upright(mode: str, orientation: int) -> None:
    image = Image.fromarray({"I;16": GREY, "I": GREY.astype(np.int32), "F": GREY.astype(np.float32)}[mode])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    image.save(stream, "tiff", exif=exif)
    flat = Image.fromarray(GREY >> 8).convert("L")
    plain = io.BytesIO()
    flat.save(plain, "tiff", exif=exif)
    found = load_image(stream.getvalue(), levels=(0, 65535))
    assert np.abs(shown(found) - shown(load_image(plain.getvalue())) / 256).max() < 0.01


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_grey_ones_name_levels_where_there_are_none(mode: str) -> None:
    text = complaint(ImageError, lambda: load_image(Image.new(mode, (20, 30))))
    assert f"mode {mode}" in text and "levels=(low, high)" in text and "--levels LOW,HIGH" in text


def test_white_may_be_zero_and_types_may_be_narrower() -> None:
    negative = load_image(tiff(65535 - GREY, t262=0), levels="full")
    assert np.abs(shown(negative) - wanted(GREY, 0, 65535)).max() < 1e-6
    maximum = io.BytesIO(b"P5 32 24 4095\n" + (GREY >> 4).astype(">u2").tobytes())
    assert np.abs(shown(load_image(maximum, levels="full")) - wanted(GREY >> 4, 0, 4095)).max() < 1e-3


def test_transparency_of_16_bits_is_laid_over_white() -> None:
    values = np.dstack((DEEP, np.full_like(GREY, 32768)))
    found = shown(load_image(png(values), levels="full"))
    assert np.abs(found - (wanted(DEEP, 0, 65535) * (32768 / 65535) + 1 - 32768 / 65535)).max() < 1e-6


@pytest.mark.parametrize("values", [DEEP, GREY], ids=["colours", "grey"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_planes_of_16_bits_are_refused_or_right(values: np.ndarray, order: str) -> None:
    for levels in (None, "full"):
        complaint(ImageError, lambda levels=levels: load_image(tiff(values, planes=True, order=order), levels=levels))
    packed = tiff(values, planes=True, packed=True, order=order)
    if values.ndim == 3:
        assert np.array_equal(shown(load_image(packed)), values >> 8)
        assert "interleaved" in complaint(ImageError, lambda: load_image(packed, levels="full"))
    else:
        assert np.abs(shown(load_image(packed, levels="full")) - wanted(values, 0, 65535)).max() < 1e-6


def test_planes_of_8_bits_are_right() -> None:
    for packed in (False, True):
        assert np.array_equal(shown(load_image(tiff(COLOURS, planes=True, packed=packed))), COLOURS)


# Arrays and tensors


@pytest.mark.parametrize(
    "dtype", ["uint16", "int16", "int32", "int64", "uint32", "float32", "float64", "float16", ">u2"]
)
@pytest.mark.parametrize("values", [GREY >> 5, DEEP >> 5], ids=["grey", "colours"])
def test_arrays_of_any_numbers_take_levels(values: np.ndarray, dtype: str) -> None:
    given = values.astype(dtype)
    tolerance = 1e-3 if dtype == "float16" else 1e-6
    assert "levels=" in complaint(ImageError, lambda: load_image(given))
    assert np.abs(shown(load_image(given, levels=(0, 2047))) - wanted(values, 0, 2047)).max() < tolerance
    if dtype not in (">u2",):
        tensor = torch.from_numpy(given)
        tensor = tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor
        assert np.abs(shown(load_image(tensor, levels=(0, 2047))) - wanted(values, 0, 2047)).max() < tolerance


def test_images_of_8_bits_stay_as_they_are() -> None:
    for given in (COLOURS, Image.fromarray(COLOURS), torch.from_numpy(COLOURS).permute(2, 0, 1)):
        assert torch.equal(load_image(given, levels=(0, 4095)), load_image(given))  # type: ignore[arg-type]


def test_values_that_have_no_place_are_refused() -> None:
    odd = GREY.astype(np.float32)
    odd[0, 0] = np.nan
    assert "not finite" in complaint(ImageError, lambda: load_image(odd, levels=(0, 1)))
    assert "levels=" in complaint(ImageError, lambda: load_image(GREY.astype(np.int64), levels="full"))
    complaint(ImageError, lambda: load_image(GREY.astype(np.complex64), levels="full"))
    assert not load_image(np.full((20, 30), 7, np.uint16), levels="percentile").any()


@pytest.mark.parametrize("given", [(1, 0), (1, 1), (0,), (0, 1, 2), "low", "1,0", (0, float("nan")), 4095, ("a", "b")])
def test_levels_that_are_none_are_refused(given: Any) -> None:
    assert "levels" in complaint(InputError, lambda: as_levels(given))
    complaint(InputError, lambda: Preprocess((0.0,) * 3, (1.0,) * 3, 16, levels=given))


# Through the surface


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


def test_every_door_takes_levels(bb: Backbone, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(GREY >> 4))
    given, levels = tmp_path / "a.png", (0, 4095)
    truth = bb.extract_features((GREY >> 4).astype(np.float32) / np.float32(4095), size=32).embedding
    for found in (
        bb.extract_features(given, size=32, levels=levels).embedding,
        bb.embed([given], size=32, levels=levels),
        next(bb.iter_features([given], size=32, levels=levels)).embedding,
        bb.embed(str(tmp_path), size=32, levels=levels, num_workers=2),
    ):
        assert np.abs(np.asarray(found) - truth.numpy()).max() < 1e-5
    assert bb.attention_maps(given, size=32, levels=levels).shape[-1] == 2


def test_levels_are_part_of_the_recipe(bb: Backbone, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png(GREY >> 4))
    out = tmp_path / "out.npy"
    bb.embed(tmp_path / "in", out, size=32, levels=(0, 4095))
    assert bb.embed(tmp_path / "in", out, size=32, levels=(0, 4095)).resumed == 1
    for other in ((0, 1000), "full", None):
        text = complaint(InputError, lambda other=other: bb.embed(tmp_path / "in", out, size=32, levels=other))
        assert "levels" in text
