"""From anything that is an image to RGB pixels: all of them, or of a JPEG a fraction that its own decoder makes."""

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
TargetSize: TypeAlias = Callable[[int, int], tuple[int, int]]  # (height, width) of an image -> what will be made of it


class Decoded(NamedTuple):
    """An image, and its size before a decoder made it smaller."""

    image: Tensor  # [3, H_px, W_px]
    original: tuple[int, int]  # (height, width) in pixels, after EXIF rotation


_DIRECT = ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "LAB", "HSV")
_ALPHA = ("RGBA", "LA", "PA", "RGBa")
_TURN = {  # EXIF orientation -> what turns it upright, whether rows become columns, whether the first comes last
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, False),
    3: (Image.Transpose.ROTATE_180, False, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False),
    6: (Image.Transpose.ROTATE_270, True, True),
    7: (Image.Transpose.TRANSVERSE, True, True),
    8: (Image.Transpose.ROTATE_90, True, False),
}
# Bytes that a pixel takes while it is decoded, ours among them, as measured; of formats that are not here, AT_MOST.
_BYTES = {"JPEG": 7, "MPO": 7, "PNG": 7, "BMP": 7, "PPM": 7, "TIFF": 10, "WEBP": 24, "JPEG2000": 24}
_AT_MOST, _PROGRESSIVE = 12, 10  # a progressive JPEG keeps all its coefficients
_DEEP = 40  # of more than 8 bits
MAX_BYTES = 2**28  # of a file
_STRIP = 2**18  # pixels that are converted at a time
_frames_told = threading.Event()  # set once a process has been warned that one frame of several is taken
_ALONE = "the picture"  # what a picture without a number is called
_BUFFERS = (bytearray, memoryview)


def load_image(source: ImageLike, label: str = _ALONE, levels: Levels | None = None, channels: int = RGB) -> Tensor:
    """Any image as RGB, [3, H_px, W_px]: uint8 in 0..255, or float32 in 0..1 if it came as float or with `levels`.

    Files are turned upright by their EXIF tag, transparency is laid over white, of an animation the first frame counts.
    A path may be an http, https, file or data address.  Arrays are [H_px, W_px, 3], tensors [3, H_px, W_px], RGB, or
    [H_px, W_px] grey, uint8 or float in 0..1; with other `channels` they have as many, and nothing else is taken.  What
    comes from a file or an array lies in memory pixel by pixel, where torch resizes it much faster.

    `levels`: of images of more than 8 bits what becomes 0 and 1: (low, high), "full" for the range of the type, or
    "percentile" for the 0.5th and 99.5th of each image.  Images of 8 bits stay as they are.  Without it only colours
    of 16 bits are taken, as reaching to 65535, and refused where none goes beyond 4095.

    Redirects are followed, to other hosts too, unless the environment has DINOV3_INFER_REDIRECTS=same-host.

    Colour profiles (ICC) are not applied, as in torchvision, timm and transformers.  Of an RGB file with more bands
    the first three count; other files of many bands are refused, since none of them is known to be red.

    Raises: MissingFileError, ImageError (damaged, 16-bit or float modes, wrong shape or range), InputTypeError.
    """
    return decode(source, label, levels=levels, channels=channels).image


def decode(
    source: ImageLike, label: str = _ALONE, target: TargetSize | None = None, levels: Levels | None = None,
    channels: int = RGB,
) -> Decoded:  # fmt: skip
    """As `load_image`; with `target` a JPEG comes at the smallest of 1, 1/2, 1/4, 1/8 that is not below that size.

    Its decoder leaves frequencies out then, so that 12 megapixels take a quarter of the time and differ a little.
    This holds for bytes and files; downloads, streams and open images come whole.

    Raises: as `load_image`, and what `target` raises.
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
    hint = ", so give the picture in it" if isinstance(source, (Mapping, tuple, list)) else ""
    hint = ", so give bytes() of it" if isinstance(source, _BUFFERS) else hint
    raise InputTypeError(
        f"a picture is a path, bytes, PIL image, array or tensor; {label} is {type(source).__name__}{hint}"
    )


def _whole(image: Tensor) -> Decoded:
    return Decoded(image, (image.shape[1], image.shape[2]))


def _from_path(path: str, label: str, target: TargetSize | None, levels: Levels | None) -> Decoded:
    if not path:
        raise MissingFileError(f"{label} is an empty path; give one that leads to a picture")
    shown = f"'{name_of(path)}'" + (f" ({label})" if label != _ALONE else "")
    place = fetched(path)
    if isinstance(place, bytes):
        return _from_file(io.BytesIO(place), shown, levels=levels)
    try:
        status = os.stat(place)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        raise MissingFileError(f"no picture at '{os.path.abspath(place)}'; check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{shown} is a folder; give it alone, or the pictures in it as a list of paths")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{shown} is a pipe or a device; give a file, or the bytes of the picture")
    if status.st_size > MAX_BYTES:
        raise _too_large(shown)
    try:
        with open(place, "rb") as stream:
            if not status.st_size:
                raise ImageError(f"{shown} is empty; copy or download it again")
            return _from_file(stream, shown, target, levels)
    except OSError as error:  # of opening it; what goes wrong in reading is an ImageError already
        raise ImageError(f"cannot read {shown}: {error.strerror}; check its permissions") from None


def _from_stream(stream: BinaryIO, label: str, levels: Levels | None) -> Decoded:
    """The image that is left in a stream; where none is left, as after it has been written or looked at, the whole."""
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
    except Exception:  # noqa: S110  # it is said below
        pass
    if not content.getbuffer().nbytes:
        raise ImageError(f"{label} is a stream that stands at its end; seek(0), or give what was written to it")
    return _from_file(content, label, levels=levels)


def _place(stream: BinaryIO) -> int:
    """Where a stream stands that can go back to its start; 0 for others."""
    try:
        return stream.tell() if stream.seekable() else 0
    except (AttributeError, OSError, ValueError):
        return 0


def _content(stream: BinaryIO, label: str) -> io.BytesIO:
    """What is left in a stream, which may have no end."""
    content = io.BytesIO()
    while chunk := stream.read(2**20):
        if not isinstance(chunk, bytes):
            raise InputTypeError(f"{label} is a stream of {type(chunk).__name__}; open it in binary mode")
        content.write(chunk)
        if content.tell() > MAX_BYTES:
            raise _too_large(label)
    return content


def _too_large(label: str) -> ImageError:
    return ImageError(f"{label} is larger than {MAX_BYTES >> 20} MiB; give the pixels, or a file of this picture alone")


def _closed(label: str) -> ImageError:
    return ImageError(f"{label} was closed before it was read; give it while its file is open, or call load() in time")


def _from_file(stream: BinaryIO, label: str, target: TargetSize | None = None, levels: Levels | None = None) -> Decoded:
    with _errors_of_pillow(label), _opened(stream) as picture:
        check_scans(picture, stream, label)
        original = None
        if target is not None and picture.format in ("JPEG", "MPO"):
            turned = _orientation(picture) in (5, 6, 7, 8)
            width, height = reversed(picture.size) if turned else picture.size
            original, least = (height, width), target(height, width)
            picture.draft(None, least if turned else (least[1], least[0]))  # (width, height); keeps the mode
        image = _from_pil(picture, label, levels)
        return _whole(image) if original is None else Decoded(image, original)


def _opened(stream: BinaryIO) -> Image.Image:
    """The header of a picture of our formats.  Not by Image.open, which warns of a camera's 100 megapixels.

    Raises: DecompressionBombError where decoding would take more than 1 GiB; that is 12 bytes for each of the
    MAX_IMAGE_PIXELS of Pillow, which a user may raise.  UnidentifiedImageError says what a file is that is no image,
    SyntaxError which kind of image Pillow does not read.
    """
    stream.seek(0)
    prefix = stream.read(512)
    Image.preinit()
    picture, refused = _read_as(FORMATS, stream, prefix)
    if picture is None and (name := plugged(prefix)):
        picture, refused = _read_as([name], stream, prefix)
    if picture is None:
        raise SyntaxError(refused) if refused else UnidentifiedImageError(what_it_is(prefix))
    if math.prod(picture.size) * _bytes_of(picture) > 12 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Image.DecompressionBombError
    return picture


def why_no_image(path: str | os.PathLike[str]) -> str | None:
    """What a file is that is no image, as the rest of a sentence; None for an image, whole or not."""
    try:
        with open(path, "rb") as stream, _opened(stream):
            return None
    except UnidentifiedImageError as error:
        return str(error)
    except Exception:  # it is said with the row of this image
        return None


def _read_as(formats: Iterable[str], stream: BinaryIO, prefix: bytes) -> tuple[Image.Image | None, str | None]:
    """The header by the first format that takes it, or why one that knows its beginning does not read the rest."""
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
            if fits and not isinstance(fits, str):  # a text says which library is missing
                stream.seek(0)
                return reader(stream, ""), None
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # what readers say to other formats
            if accepts is not None and fits and unreadable(error):
                refused = refused or f"{name}, {error}"
    return None, refused


def _bytes_of(picture: Image.Image) -> int:
    found = _BYTES.get(picture.format or "", _AT_MOST)
    if is_deep(picture):
        return _DEEP
    if picture.mode == "CMYK":
        return max(found, _AT_MOST)
    return _PROGRESSIVE if found == _BYTES["JPEG"] and picture.info.get("progressive") else found


@contextlib.contextmanager
def _errors_of_pillow(label: str) -> Iterator[None]:
    """What Pillow says of a bad picture, in our words."""
    try:
        yield
    except Dinov3Error:
        raise
    except Image.DecompressionBombError:
        raise ImageError(
            f"{label} has so many pixels that decoding takes more than 1 GiB; make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except UnidentifiedImageError as error:
        raise ImageError(f"{label} {error}") from None
    except Exception as error:  # its readers of damaged files raise anything, IndexError and struct.error too
        reason = str(error).split("<")[0].strip() or type(error).__name__  # Pillow prints addresses of objects in <>
        if isinstance(error, ValueError) and "closed" in reason:
            raise _closed(label) from None
        if unreadable(error):
            kind = f"is of a kind that Pillow does not read ({reason}); convert it to PNG"
            bands = ", or give its red, green and blue bands as an array" if " pixel" in reason else ""
            raise ImageError(f"{label} {kind}{bands}") from None
        cut = re.search("truncated|eof|end of file", reason, re.IGNORECASE)
        kind = "cut short" if cut else "of a kind that this Pillow does not read: open it elsewhere and save it as PNG"
        how = "check the disk and its mount" if getattr(error, "errno", None) else f"the file is damaged or {kind}"
        raise ImageError(f"cannot decode {label}: {reason}; {how}") from None


def _from_pil(picture: Image.Image, label: str, levels: Levels | None) -> Tensor:
    if 0 in picture.size:
        raise ImageError(f"{label} has no pixels, it is {picture.width} wide and {picture.height} high")
    if picture.mode not in (*_DIRECT, *_ALPHA) and not is_deep(picture):
        raise ImageError(f"{label} has mode {picture.mode}, which does not become RGB; convert it yourself")
    if levels is None and picture.mode not in (*_DIRECT, *_ALPHA):
        raise ask_for_levels(f"{label} has mode {picture.mode}, whose range is not 0 to 255")
    if getattr(picture, "tile", None) and getattr(picture, "fp", None) is None:  # not read yet, and nothing to read
        raise _closed(label)
    keep_freed_memory()
    check_planes(picture, label)
    if levels is not None and is_deep(picture):
        return deep_grey(picture, label, levels, lambda: _orientation(picture))
    content = file_of_16_bits(picture)
    if levels is not None and content is not None:
        return deep_colours(content, label, levels, _opened, lambda: _orientation(picture))
    picture.load()  # which turns a TIFF upright and takes the tag away
    if content is not None:
        check_reach(picture, content, label, _opened)
    turn, turned, backwards = _TURN.get(_orientation(picture), (None, False, False))
    width, height = picture.size
    upright = np.empty((width, height, 3) if turned else (height, width, 3), np.uint8)
    # in strips that stay in the cache: 12 megapixels take 45 ms and 86 MiB, with ImageOps.exif_transpose 110 and 160
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = _opaque(picture if rows >= height else picture.crop((0, top, width, bottom)))
        strip = strip if turn is None else strip.transpose(turn)
        place = slice(height - bottom, height - top) if backwards else slice(top, bottom)
        upright[(slice(None), place) if turned else place] = np.asarray(strip)
    with contextlib.suppress(Exception):  # a second frame that is damaged is none
        # a camera's MPO is one photograph, and who has turned to another frame wants that
        animated = getattr(picture, "is_animated", False) and picture.format != "MPO" and picture.tell() == 0
        if animated and not _frames_told.is_set():
            _frames_told.set()
            log.warning("%s has several frames; the first is taken, of this and of all others", one_line(label))
    return torch.from_numpy(upright).permute(2, 0, 1)


def _orientation(picture: Image.Image) -> int:
    """As EXIF counts, from 1, which is upright."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1)  # type: ignore[no-any-return]


def _opaque(picture: Image.Image) -> Image.Image:
    """As RGB, transparency laid over white."""
    if picture.mode in _ALPHA or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")
