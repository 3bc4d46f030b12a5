"""Decoding images of any kind to RGB gives the right colours or a clear error."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint, photo, plain
from PIL import Image
from torch import Tensor

from dinov3_infer.errors import Dinov3Error, ImageError, InputTypeError, MissingFileError
from dinov3_infer.images import decode as module
from dinov3_infer.images.decode import load_image
from dinov3_infer.images.opening import each_image


def encoded(image: Image.Image, form: str = "png", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def hwc(image: Tensor) -> np.ndarray:
    """[3, H, W] -> [H, W, 3]"""
    return image.permute(1, 2, 0).numpy()


UPRIGHT = np.kron([[[250, 10, 10], [10, 250, 10], [10, 10, 250]], [[10, 10, 10], [250, 250, 250], [250, 250, 10]]],
                  np.ones((16, 16, 1))).astype(np.uint8)  # fmt: skip
STORED_AS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation: how the camera stored an upright scene
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_images_are_turned_upright(form, orientation, tmp_path) -> None:
    """All eight EXIF orientations give the same scene, as bytes, file and open image."""
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](UPRIGHT)))
    exif = stored.getexif()
    exif[0x0112] = orientation
    content = encoded(stored, form, exif=exif, **({"quality": 95, "subsampling": 0} if form == "jpeg" else {}))
    (tmp_path / "scene").write_bytes(content)
    for source in (content, tmp_path / "scene", str(tmp_path / "scene"), Image.open(io.BytesIO(content))):
        far = np.abs(hwc(load_image(source)).astype(int) - UPRIGHT).max()
        assert far <= (20 if form == "jpeg" else 0)  # JPEG of flat blocks errs by a few levels, the colours by 240


PALETTE = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
PALETTE.putpalette([255, 0, 0, 0, 0, 255])


@pytest.mark.parametrize(
    ("mode", "value", "colour"),
    [
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)), ("RGBA", (9, 9, 9, 0), (255,) * 3),
        ("RGBA", (0, 0, 0, 51), (204,) * 3), ("RGBa", (0, 0, 0, 51), (204,) * 3),
        ("LA", (0, 51), (204,) * 3), ("L", 77, (77,) * 3), ("1", 1, (255,) * 3),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("YCbCr", (50, 128, 128), (50,) * 3),
    ],
    ids=str,
)  # fmt: skip
def test_modes_become_rgb_over_white(mode, value, colour) -> None:
    """Colour modes are converted to RGB, and transparency is composited over white."""
    assert load_image(Image.new(mode, (2, 1), value))[:, 0, 0].tolist() == list(colour)


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        (encoded(PALETTE), [[255, 0, 0], [0, 0, 255]]),
        (encoded(PALETTE, transparency=1), [[255, 0, 0], [255, 255, 255]]),
        (encoded(PALETTE, transparency=bytes([255, 51])), [[255, 0, 0], [204, 204, 255]]),
        (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)), [[255, 255, 255]] * 2),
        (encoded(PALETTE, "gif", save_all=True, append_images=[Image.new("P", (2, 1), 1)]), [[255, 0, 0], [0, 0, 255]]),
        (encoded(Image.new("1", (2, 1), 1), "tiff"), [[255, 255, 255]] * 2),
    ],
    ids=["palette", "palette_key", "palette_alpha", "rgb_key", "animation_first_frame", "bilevel_tiff"],
)
def test_files_become_rgb_over_white(content, pixels) -> None:
    """Palettes and key colours may be transparent; an animation gives its first frame."""
    assert hwc(load_image(content))[0].tolist() == pixels


DEEP = Image.fromarray(np.full((3, 4), 30_000, np.uint16))


@pytest.mark.parametrize(
    "source",
    [
        DEEP, Image.new("I", (4, 3)), Image.new("F", (4, 3)), encoded(DEEP), encoded(DEEP, transparency=5),
        encoded(DEEP, "tiff"), encoded(Image.new("F", (4, 3)), "tiff"), encoded(Image.new("I", (4, 3)), "tiff"),
    ],
    ids=["I;16", "I", "F", "I;16_png", "I;16_png_with_key_colour", "I;16_tiff", "F_tiff", "I_tiff"],
)  # fmt: skip
def test_deep_modes_are_refused(source) -> None:
    """Pillow would silently turn these images white or black."""
    text = complaint(ImageError, lambda: load_image(source, "item 7"))
    assert "item 7" in text and "mode" in text and "levels=" in text


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "RGBa", "La", "P", "PA", "LAB", "HSV", "I;16L", "I;16B"])
def test_every_mode_is_an_image_or_a_sentence(mode) -> None:
    """Every mode of Pillow is decoded or gives an ImageError."""
    try:
        assert load_image(Image.new(mode, (4, 3))).shape == (3, 3, 4)
    except ImageError as error:
        assert mode in str(error)


PNG, JPEG = (encoded(Image.fromarray(photo(64, 64)), form) for form in ("png", "jpeg"))


@pytest.mark.parametrize("form", ["path", "bytes", "open image"])
@pytest.mark.parametrize("content", [JPEG[: len(JPEG) // 2], PNG[:3000]], ids=["jpeg", "png"])
def test_truncated_files_are_said(content, form, tmp_path) -> None:
    """A truncated image is an ImageError that names the file or the item, whatever its source."""
    path = tmp_path / "cut"
    path.write_bytes(content)
    source: Any = {"path": path, "bytes": content}.get(form) or Image.open(io.BytesIO(content))
    text = complaint(ImageError, lambda: plain(64).batch([photo(64, 64), source]))
    assert "truncated" in text and ("cut" if form == "path" else "item 1") in text


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n", JPEG[:30], b"GIF89a"], ids=repr)
def test_what_is_no_image_is_said(content, tmp_path) -> None:
    """For an error page, an empty file and a bare header the message has the path, and no address of an object."""
    path = tmp_path / "item.jpg"
    path.write_bytes(content)
    assert "item 1" in complaint(ImageError, lambda: plain(64).batch([photo(64, 64), content]))
    assert str(path) in complaint(ImageError, lambda: load_image(path))
    assert isinstance(pytest.raises(ValueError, load_image, path).value, ImageError)


def test_missing_files_are_said_with_their_whole_path(tmp_path, monkeypatch) -> None:
    """A missing file is a FileNotFoundError with the absolute path."""
    monkeypatch.chdir(tmp_path)
    text = complaint(MissingFileError, lambda: load_image("images/cat.jpg"))
    assert str(Path(tmp_path, "images/cat.jpg")) in text and issubclass(MissingFileError, FileNotFoundError)


def test_decompression_bombs_are_refused(monkeypatch) -> None:
    """Pillow's limit applies, and the message says how to raise it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "MAX_IMAGE_PIXELS" in complaint(ImageError, lambda: load_image(JPEG))


def test_one_image_in_every_form_gives_the_same_pixels(tmp_path) -> None:
    """Path, bytes, PIL, array, tensor, read-only, strided, float; alone, in lists, iterators and 4-D batches."""
    array = photo(50, 40)
    frozen, big = array.copy(), np.zeros((100, 80, 3), np.uint8)
    frozen.flags.writeable = False
    big[::2, ::2] = array
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    files = (path, str(path), path.read_bytes(), Image.open(path))
    for source in (*files, array, frozen, big[::2, ::2], tensor, tensor.contiguous()):
        assert np.array_equal(hwc(load_image(source)), array)
    for floats in (
        array / 255,
        (array / 255).astype("f4"),
        (array / 255).astype("f4", order="F"),
        (tensor / 255).double(),
    ):
        image = load_image(floats)
        assert image.dtype == torch.float32 and np.abs(hwc(image) * 255 - array).max() < 1e-4  # float32 near 255
    stacked = (np.stack([array] * 2), torch.stack([tensor] * 2))
    for images in ([array, tensor], iter([path, path]), (a for a in [array] * 2), *stacked):
        batch = plain((50, 40)).batch(each_image(images))
        assert batch.pixels.shape == (2, 3, 50, 40) and torch.equal(batch.pixels[1], tensor / 255)
    assert len(each_image(array)) == len(each_image(path)) == len(each_image(tensor)) == 1


A, T = np.zeros((6, 5, 3), np.uint8), torch.zeros(3, 6, 5)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (A[..., :2], "[6, 5, 2]"), (A[:, 0], "[6, 3]"), (A.transpose(2, 0, 1), "channels first"),
        (np.zeros((6, 5, 4), np.uint8), "[6, 5, 4]"),
        (A.astype(np.int32), "int32"), (A.astype(np.uint16), "uint16"), (A.astype(bool), "bool"),
        (A + 200.0, "0 to 255"), (A - 1.0, "normalised"), (A + np.nan, "finite"), (A + np.inf, "finite"),
        (A[:0], "[0, 5, 3]"), (A[:, :0], "[6, 0, 3]"), (A[None], "[1, 6, 5, 3]"), (A.astype(object), "object"),
        (T[:2], "[2, 6, 5]"), (T.permute(1, 2, 0), "channels last"), (torch.zeros(4, 6, 5), "[4, 6, 5]"),
        (T.int(), "int32"), (T.bool(), "bool"), (T.to(torch.complex64), "complex"),
        (T + 255, "0 to 255"), (T - 0.1, "normalised"), (T + torch.nan, "finite"), (T - torch.inf, "finite"),
        (T[:, :0], "[3, 0, 5]"), (T.expand(2, 3, 6, 5), "[2, 3, 6, 5]"), (Image.new("RGB", (0, 5)), "0"),
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)  # fmt: skip
def test_wrong_arrays_and_tensors_are_said(source, said) -> None:
    """Errors of shape, dtype and range state what was given, which item it was, and the likely cause."""
    text = complaint(ImageError, lambda: plain(64).batch([photo(64, 64), source]))
    assert said in text and "item 1" in text


@pytest.mark.parametrize("source", [None, 3, 2.5, object(), bytearray(JPEG)], ids=lambda v: type(v).__name__)
def test_other_kinds_are_type_errors(source) -> None:
    """The message has the name of the type, and not the address of the object."""
    assert type(source).__name__ in complaint(InputTypeError, lambda: plain(64).batch([photo(64, 64), source]))


def test_arrays_of_the_other_byte_order_are_read() -> None:
    """Readers of FITS and old TIFF files give big-endian floats."""
    assert torch.equal(load_image((photo(6, 5) / 255).astype(">f4")), load_image((photo(6, 5) / 255).astype("f4")))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_a_buffer_is_one_image_and_should_be_bytes(kind: type) -> None:
    """A buffer is not treated as a list of numbers."""
    text = complaint(InputTypeError, lambda: plain(64).batch(each_image(kind(JPEG))))
    assert f"the image is of type {kind.__name__}; give bytes() of it" in text


def test_what_is_closed_is_not_said_to_be_damaged(tmp_path) -> None:
    """An open image, its file and a stream may be closed by the end of a `with` block."""
    (tmp_path / "a.png").write_bytes(PNG)
    with Image.open(tmp_path / "a.png") as image:
        pass
    with open(tmp_path / "a.png", "rb") as stream:
        lazy = Image.open(stream)
    for source in (image, lazy, stream):
        text = complaint(ImageError, lambda source=source: load_image(source, "item 1"))
        assert "item 1 was closed before it was read" in text and "damaged" not in text


def test_open_files_are_read(tmp_path) -> None:
    """A stream is one image, not an iterable of lines."""
    content = encoded(Image.fromarray(photo(20, 30)))
    (tmp_path / "a.png").write_bytes(content)
    with open(tmp_path / "a.png", "rb") as stream:
        for source in (stream, io.BytesIO(content)):
            (only,) = each_image(source)
            assert np.array_equal(hwc(load_image(only)), photo(20, 30))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (".", "is a folder; give the folder alone, or a list of the images"),
        (np.zeros((5, 3), np.uint8), "is it a row of an image?"),
        (np.zeros((4, 5, 4), np.uint8), "drop an alpha channel"),
        (np.zeros((2, 4, 5, 3), np.uint8), "alone, not in a list"),
        (torch.zeros(1, 2, 3, 4, 5), "alone, not in a list"), (torch.zeros(3, 0, 5), "has no pixels"),
        ("", "is an empty path"),
    ],
    ids=["folder", "row", "alpha", "batch", "five dimensions", "no pixels", "no path"],
)  # fmt: skip
def test_remedies(source, said) -> None:
    assert said in complaint(Dinov3Error, lambda: load_image(source))


def gif(frames: int, **options: Any) -> bytes:
    images = [Image.fromarray(photo(20, 30, seed=i)) for i in range(frames)]
    return encoded(images[0], "gif", save_all=True, append_images=images[1:], **options)


def test_frames_are_mentioned_once(caplog) -> None:
    """There is one warning per process, none for a single frame, and none for an image moved to another frame."""
    module._frames_told.clear()
    turned = Image.open(io.BytesIO(gif(3)))
    turned.seek(1)
    for still in (gif(1), turned, PNG):
        load_image(still)
    assert not caplog.records
    assert torch.equal(load_image(gif(3), "item 4"), load_image(gif(1))) and load_image(gif(2)).shape == (3, 20, 30)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "item 4" in record.getMessage() and "first" in record.getMessage()


def test_a_damaged_second_frame_does_not_matter() -> None:
    """The decoder only checks whether a second frame exists, after reading the first."""
    module._frames_told.clear()
    whole, first = gif(2), load_image(gif(1))
    second = whole.rindex(b"\x21\xf9")
    for cut in range(second, len(whole), 101):
        assert torch.equal(load_image(whole[:cut]), first)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_of_any_kind_is_an_image_error() -> None:
    """300 mutations of eight formats are decoded or give an ImageError, whatever Pillow's readers raise."""
    draw, image = random.Random(0), Image.fromarray(photo(20, 30))
    forms = ("png", "jpeg", "gif", "webp", "tiff", "bmp", "dds", "tga")
    seeds, errors = [encoded(image, form) for form in forms], 0
    for _ in range(300):
        content = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(min(len(content), draw.choice((64, len(content)))))] = draw.choice((0, 255, 9))
        try:
            load_image(bytes(content))
        except ImageError as error:
            errors += 1
            assert "\n" not in str(error) and "0x" not in str(error)
    assert 50 < errors < 290


def test_an_unreadable_file_is_said(tmp_path) -> None:
    """A file without read permission is not reported as damaged."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    path.chmod(0)
    try:
        path.read_bytes()
    except PermissionError:
        text = complaint(ImageError, lambda: load_image(path))
        assert "Permission denied" in text and "permissions" in text and "damaged" not in text
    else:
        pytest.skip("who runs this may read everything")


def test_a_file_has_its_name_and_its_number(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG[:500])
    text = complaint(ImageError, lambda: plain(64).batch([photo(64, 64), path]))
    assert f"cannot decode '{path}' (item 1): " in text


@pytest.mark.parametrize("row", [{"image": PNG}, (PNG, 3), [PNG]], ids=["dict", "tuple", "list"])
def test_rows_of_datasets_are_no_images(row) -> None:
    """Iterating over a Dataset gives such rows."""
    text = complaint(InputTypeError, lambda: plain(64).batch([photo(64, 64), row]))
    assert f"item 1 is of type {type(row).__name__}; give the image inside it" in text
