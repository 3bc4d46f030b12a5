"""Decodes images to RGB pixels, at full size or, for a JPEG, at a fraction that its decoder produces."""

import contextlib
import io
import logging
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..errors import Dinov3Error, ImageError, InputTypeError, MissingFileError, one_line
from ..system import keep_freed_memory
from .deep import check_planes, check_reach, deep_colours, deep_grey, file_of_16_bits, is_deep
from .foreign import plugged, unreadable, what_it_is
from .levels import Levels, ask_for_levels
from .paths import FORMATS, fetched, name_of
from .pixels import RGB, from_pixels, no_rgb
from .scans import check_scans

__all__ = ["MAX_BYTES", "Decoded", "ImageLike", "TargetSize", "decode", "load_image", "why_no_image"]

log = logging.getLogger("dinov3_infer")

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor
TargetSize: TypeAlias = Callable[[int, int], tuple[int, int]]  # (height, width) of an image -> the size it will get


class Decoded(NamedTuple):
    """A decoded image, and its size before the decoder reduced it."""

    image: Tensor  # [3, H_px, W_px]
    original: tuple[int, int]  # (height, width) in pixels, after EXIF rotation


_DIRECT = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV")
_ALPHA = ("RGBA", "LA", "PA", "RGBa")
_TURN = {  # EXIF orientation -> transpose that makes it upright, whether axes swap, whether rows come in reverse
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, False),
    3: (Image.Transpose.ROTATE_180, False, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False),
    6: (Image.Transpose.ROTATE_270, True, True),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, False),
}
# Measured bytes per pixel while decoding, our own copy included; _AT_MOST holds for formats without an entry.
_BYTES = {"JPEG": 7, "MPO": 7, "PNG": 7, "BMP": 7, "PPM": 7, "TIFF": 10, "WEBP": 24, "JPEG2000": 24}
_AT_MOST, _PROGRESSIVE, _DEEP = 12, 10, 40  # progressive: all coefficients are kept; deep: more than 8 bits
MAX_BYTES, _STRIP = 2**28, 2**18  # size limit of a file; pixels converted at a time
_frames_told = threading.Event()  # set after the warning about animations, which a process gives once
_ALONE = "the image"  # label of a single image


def load_image(source: ImageLike, label: str = _ALONE, levels: Levels | None = None, channels: int = RGB) -> Tensor:
    """Decode an image to RGB pixels.

    Files are rotated by their EXIF orientation, transparency is composited over white, and an animation gives its
    first frame.  Colour profiles (ICC) are not applied, as in torchvision, timm and transformers.

    Args:
        source: A path, an http, https, file or data address, bytes, a binary stream, a PIL image, an array
            [H_px, W_px, 3] or a tensor [3, H_px, W_px].  Arrays and tensors hold uint8 or floats in 0..1, and may be
            grey: [H_px, W_px].  Redirects to other hosts are followed unless DINOV3_INFER_REDIRECTS=same-host is set.
        label: Name of the image in errors.
        levels: Values that become 0 and 1 in images with more than 8 bits per channel: (low, high), "full" for the
            range of the dtype, or "percentile" for the 0.5th and 99.5th percentile of each image.  By default 16-bit
            colours are read as 0..65535, and refused if no value is above 4095.
        channels: Channels of the model.  If not 3, only arrays and tensors with that many channels are accepted.

    Returns: [channels, H_px, W_px] uint8, or float32 in 0..1 if the source holds floats or `levels` applied.

    Raises:
        MissingFileError: There is no file at the path.
        ImageError: The image is damaged, needs `levels`, or has a wrong mode, shape or range.
        InputTypeError: `source` has another type.

    Example:
        >>> load_image("photo.jpg")  # uint8, [3, H_px, W_px]
    """
    return decode(source, label, levels=levels, channels=channels).image


def decode(
    source: ImageLike, label: str = _ALONE, target: TargetSize | None = None, levels: Levels | None = None,
    channels: int = RGB,
) -> Decoded:  # fmt: skip
    """Decode an image to [channels, H_px, W_px] as `load_image` does, and report its size before any reduction.

    `target` maps (height, width) to the size needed.  A JPEG file is then decoded at the smallest of 1, 1/2, 1/4 and
    1/8 that is not below it: four times faster at 12 megapixels, with slightly other values, since the decoder drops
    high frequencies.  Downloads, streams and PIL images are decoded at full size.  Raises what `target` raises too.
    """
    if isinstance(source, (Tensor, np.ndarray)):
        return _whole(from_pixels(source, label, levels, channels))
    if channels != RGB:
        raise no_rgb(f"'{name_of(source)}'" if isinstance(source, (str, os.PathLike)) else label, channels)
    if isinstance(source, Image.Image):
        with _errors_of_pillow(label):
            return _whole(_from_pil(source, label, levels))
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"{label} ({len(source)} bytes)", target, levels)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fsdecode(source), label, target, levels)
    if hasattr(source, "read"):
        return _from_stream(source, label, levels)
    hint = "; give the image inside it" if isinstance(source, (Mapping, tuple, list)) else ""
    hint = "; give bytes() of it" if isinstance(source, (bytearray, memoryview)) else hint
    raise InputTypeError(
        f"an image is a path, bytes, PIL image, array or tensor; {label} is of type {type(source).__name__}{hint}"
    )


def _whole(image: Tensor) -> Decoded:
    return Decoded(image, (image.shape[1], image.shape[2]))


def _from_path(path: str, label: str, target: TargetSize | None, levels: Levels | None) -> Decoded:
    if not path:
        raise MissingFileError(f"{label} is an empty path; give the path of an image")
    shown = f"'{name_of(path)}'" + (f" ({label})" if label != _ALONE else "")
    place = fetched(path)
    if isinstance(place, bytes):
        return _from_file(io.BytesIO(place), shown, levels=levels)
    try:
        status = os.stat(place)
    except (OSError, ValueError):  # ValueError: an impossible file name
        raise MissingFileError(f"no image at '{os.path.abspath(place)}'; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{shown} is a folder; give the folder alone, or a list of the images in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{shown} is a pipe or a device; give a file or the bytes of the image")
    if status.st_size > MAX_BYTES:
        raise _too_large(shown)
    try:
        with open(place, "rb") as stream:
            if not status.st_size:
                raise ImageError(f"{shown} is empty; copy or download it again")
            return _from_file(stream, shown, target, levels)
    except OSError as error:  # from open(); failed reads are ImageErrors already
        raise ImageError(f"cannot read {shown}: {error.strerror}; check its permissions") from None


def _from_stream(stream: BinaryIO, label: str, levels: Levels | None) -> Decoded:
    """Decode the rest of a stream, or the whole stream if the rest holds no image, as after writing to it."""
    if getattr(stream, "closed", False):
        raise _closed(label)
    start = _place(stream)
    content = _content(stream, label)
    try:
        with _opened(content):
            pass
    except UnidentifiedImageError:
        if start:
            stream.seek(0)
            content = _content(stream, label)
    except Exception:  # noqa: S110  # `_from_file` below reports it
        pass
    if not content.getbuffer().nbytes:
        raise ImageError(f"{label} is a stream at its end; call seek(0), or give the bytes")
    return _from_file(content, label, levels=levels)


def _place(stream: BinaryIO) -> int:
    """Position of a seekable stream; 0 for other streams."""
    try:
        return stream.tell() if stream.seekable() else 0
    except (AttributeError, OSError, ValueError):
        return 0


def _content(stream: BinaryIO, label: str) -> io.BytesIO:
    """Read the rest of a stream, at most MAX_BYTES, since a stream may be endless."""
    content = io.BytesIO()
    while chunk := stream.read(2**20):
        if not isinstance(chunk, bytes):
            raise InputTypeError(f"{label} is a stream of {type(chunk).__name__}; open it in binary mode")
        content.write(chunk)
        if content.tell() > MAX_BYTES:
            raise _too_large(label)
    return content


def _too_large(label: str) -> ImageError:
    return ImageError(f"{label} is larger than {MAX_BYTES >> 20} MiB; give its pixels, or a file with this image only")


def _closed(label: str) -> ImageError:
    return ImageError(f"{label} was closed before it was read; keep its file open, or call load() before closing it")


def _from_file(stream: BinaryIO, label: str, target: TargetSize | None = None, levels: Levels | None = None) -> Decoded:
    with _errors_of_pillow(label), _opened(stream) as image:
        check_scans(image, stream, label)
        original = None
        if target is not None and image.format in ("JPEG", "MPO"):
            turned = _orientation(image) in (5, 6, 7, 8)
            width, height = reversed(image.size) if turned else image.size
            original, least = (height, width), target(height, width)
            image.draft(None, least if turned else (least[1], least[0]))  # (width, height); keeps the mode
        pixels = _from_pil(image, label, levels)
        return _whole(pixels) if original is None else Decoded(pixels, original)


def _opened(stream: BinaryIO) -> Image.Image:
    """Read the header of an image; `Image.open` would warn about a camera's 100 megapixels.

    Raises: DecompressionBombError if decoding takes more than 1 GiB (12 bytes for each of Pillow's MAX_IMAGE_PIXELS,
    which users may raise), UnidentifiedImageError for no image, SyntaxError for a kind that Pillow does not read.
    """
    stream.seek(0)
    prefix = stream.read(512)
    Image.preinit()
    image, refused = _read_as(FORMATS, stream, prefix)
    if image is None and (name := plugged(prefix)):
        image, refused = _read_as([name], stream, prefix)
    if image is None:
        raise SyntaxError(refused) if refused else UnidentifiedImageError(what_it_is(prefix))
    if math.prod(image.size) * _bytes_of(image) > 12 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    return image


def why_no_image(path: str | os.PathLike[str]) -> str | None:
    """Say what a file is that is no image, as the rest of a sentence; None for an image, even a damaged one."""
    try:
        with open(path, "rb") as stream, _opened(stream):
            return None
    except UnidentifiedImageError as error:
        return str(error)
    except Exception:  # reported when this image is read
        return None


def _read_as(formats: Iterable[str], stream: BinaryIO, prefix: bytes) -> tuple[Image.Image | None, str | None]:
    """Try the readers of `formats`: the header, or why a reader that knows the signature refused the rest."""
    refused = None
    for name in formats:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN:
            continue
        reader, accepts = Image.OPEN[name]
        fits: Any = False
        try:
            fits = accepts is None or accepts(prefix[:16])
            if fits and not isinstance(fits, str):  # a str names a missing library
                stream.seek(0)
                return reader(stream, ""), None
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # raised for other formats
            if accepts is not None and fits and unreadable(error):
                refused = refused or f"{name}, {error}"
    return None, refused


def _bytes_of(image: Image.Image) -> int:
    found = _BYTES.get(image.format or "", _AT_MOST)
    if is_deep(image):
        return _DEEP
    if image.mode == "CMYK":
        return max(found, _AT_MOST)
    return _PROGRESSIVE if found == _BYTES["JPEG"] and image.info.get("progressive") else found


@contextlib.contextmanager
def _errors_of_pillow(label: str) -> Iterator[None]:
    """Turn Pillow's exceptions into ImageErrors."""
    try:
        yield
    except Dinov3Error:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            f"{label} has so many pixels that decoding takes more than 1 GiB; make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
        ) from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} {error}") from None
    except Exception as error:  # readers raise any exception for damaged files, even IndexError and struct.error
        reason = str(error).split("<")[0].strip() or type(error).__name__  # Pillow prints object addresses in <>
        if isinstance(error, ValueError) and "closed" in reason:
            raise _closed(label) from None
        if unreadable(error):
            kind = f"has a format that Pillow does not read ({reason}); convert it to PNG"
            bands = ", or give its red, green and blue bands as an array" if " pixel" in reason else ""
            raise ImageError(f"{label} {kind}{bands}") from None
        cut = re.search("truncated|eof|end of file", reason, re.IGNORECASE)
        kind = "truncated" if cut else "in a format that this Pillow does not read; save it as PNG with another program"
        how = "check the disk and its mount" if getattr(error, "errno", None) else f"the file is damaged or {kind}"
        raise ImageError(f"cannot decode {label}: {reason}; {how}") from None


def _from_pil(image: Image.Image, label: str, levels: Levels | None) -> Tensor:
    if 0 in image.size:
        raise ImageError(f"{label} has no pixels: it is {image.width} wide and {image.height} high")
    if image.mode not in (*_DIRECT, *_ALPHA) and not is_deep(image):
        raise ImageError(f"{label} has mode {image.mode}, which cannot be converted to RGB; convert it yourself")
    if levels is None and image.mode not in (*_DIRECT, *_ALPHA):
        raise ask_for_levels(f"{label} has mode {image.mode}, whose range is not 0 to 255")
    if getattr(image, "tile", None) and getattr(image, "fp", None) is None:  # pixels not read, and the file is closed
        raise _closed(label)
    keep_freed_memory()
    check_planes(image, label)
    if levels is not None and is_deep(image):
        return deep_grey(image, label, levels, lambda: _orientation(image))
    content = file_of_16_bits(image)
    if levels is not None and content is not None:
        return deep_colours(content, label, levels, _opened, lambda: _orientation(image))
    image.load()  # rotates a TIFF and removes its orientation tag
    if content is not None:
        check_reach(image, content, label, _opened)
    turn, turned, backwards = _TURN.get(_orientation(image), (None, False, False))
    width, height = image.size
    upright = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    # strips stay in the cache: 12 megapixels take 45 ms and 86 MiB, and 110 ms and 160 MiB with ImageOps.exif_transpose
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = _opaque(image if rows >= height else image.crop((0, top, width, bottom)))
        strip = strip if turn is None else strip.transpose(turn)
        place = slice(height - bottom, height - top) if backwards else slice(top, bottom)
        upright[(slice(None), place) if turned else place] = np.asarray(strip)
    with contextlib.suppress(Exception):  # a damaged second frame does not count
        # a camera's MPO is one photograph; a PIL image at another frame was moved there on purpose
        animated = getattr(image, "is_animated", False) and image.format != "MPO" and image.tell() == 0
        if animated and not _frames_told.is_set():
            _frames_told.set()
            log.warning("%s has several frames; only the first frame of animations is used", one_line(label))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 is upright."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)  # type: ignore[no-any-return]


def _opaque(image: Image.Image) -> Image.Image:
    """Convert to RGB, with transparency composited over white."""
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
