"""From anything that is an image to RGB pixels: all of them, or of a JPEG a fraction that its own decoder makes."""

import contextlib
import io
import logging
import math
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..errors import Dinov3Error, ImageError, InputTypeError, MissingFileError, one_line
from ..system import keep_freed_memory
from .paths import FORMATS, fetched, name_of
from .scans import check_scans

__all__ = ["MAX_BYTES", "Decoded", "ImageLike", "TargetSize", "decode", "from_hwc", "load_image"]

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
MAX_BYTES = 2**28  # of a file
_STRIP = 2**18  # pixels that are converted at a time
_frames_told = threading.Event()  # set once a process has been warned that one frame of several is taken
_ALONE = "the picture"  # what a picture without a number is called
_BUFFERS = (bytearray, memoryview)
_REMEDY = "repeat a grey channel three times, drop an alpha channel, or give a PIL image, which is converted"


def load_image(source: ImageLike, label: str = _ALONE) -> Tensor:
    """Any picture as RGB, [3, H_px, W_px]: uint8 in 0..255, or float32 in 0..1 if it came as float.

    Files are turned upright by their EXIF tag, transparency is laid over white, of an animation the first frame counts.
    A path may be an http, https, file or data address; redirects are followed, to other hosts too, unless
    DINOV3_INFER_REDIRECTS=same-host is in the environment, as a server that embeds what users send wants it.

    Arrays are [H_px, W_px, 3], tensors [3, H_px, W_px], RGB, uint8 or float in 0..1.  What comes from a file or an
    array lies in memory pixel by pixel, where torch resizes it several times as fast as channel by channel.

    Raises: MissingFileError, ImageError (damaged, 16-bit or float modes, wrong shape or range), InputTypeError.
    """
    return decode(source, label).image


def decode(source: ImageLike, label: str = _ALONE, target: TargetSize | None = None) -> Decoded:
    """As `load_image`; with `target` a JPEG comes at the smallest of 1, 1/2, 1/4, 1/8 that is not below that size.

    Its decoder leaves frequencies out then, so that 12 megapixels take a quarter of the time and differ a little.
    This holds for bytes and files; downloads, streams and open images come whole.

    Raises: as `load_image`, and what `target` raises.
    """
    if isinstance(source, Tensor):
        return _whole(_from_tensor(source, label))
    if isinstance(source, np.ndarray):
        return _whole(_from_array(source, label))
    if isinstance(source, Image.Image):
        with _errors_of_pillow(label):
            return _whole(_from_pil(source, label))
    if isinstance(source, bytes):
        return _from_file(io.BytesIO(source), f"{label} ({len(source)} bytes)", target)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fsdecode(source), label, target)
    if hasattr(source, "read"):
        return _from_file(_content(source, label), label)
    hint = ", so give the picture in it" if isinstance(source, (Mapping, tuple, list)) else ""
    hint = ", so give bytes() of it" if isinstance(source, _BUFFERS) else hint
    raise InputTypeError(
        f"a picture is a path, bytes, PIL image, array or tensor; {label} is {type(source).__name__}{hint}"
    )


def _whole(image: Tensor) -> Decoded:
    return Decoded(image, (image.shape[1], image.shape[2]))


def _from_path(path: str, label: str, target: TargetSize | None) -> Decoded:
    if not path:
        raise MissingFileError(f"{label} is an empty path; give one that leads to a picture")
    shown = f"'{name_of(path)}'" + (f" ({label})" if label != _ALONE else "")
    place = fetched(path)
    if isinstance(place, bytes):
        return _from_file(io.BytesIO(place), shown)
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
            return _from_file(stream, shown, target)
    except OSError as error:  # of opening it; what goes wrong in reading is an ImageError already
        raise ImageError(f"cannot read {shown}: {error.strerror}; check its permissions") from None


def _content(stream: BinaryIO, label: str) -> BinaryIO:
    """What is left in a stream, which may have no end."""
    if getattr(stream, "closed", False):
        raise _closed(label)
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


def _from_file(stream: BinaryIO, label: str, target: TargetSize | None = None) -> Decoded:
    with _errors_of_pillow(label), _opened(stream) as picture:
        check_scans(picture, stream, label)
        original = None
        if target is not None and picture.format in ("JPEG", "MPO"):
            turned = _orientation(picture) in (5, 6, 7, 8)
            width, height = reversed(picture.size) if turned else picture.size
            original, least = (height, width), target(height, width)
            picture.draft(None, least if turned else (least[1], least[0]))  # (width, height); keeps the mode
        image = _from_pil(picture, label)
        return _whole(image) if original is None else Decoded(image, original)


def _opened(stream: BinaryIO) -> Image.Image:
    """The header of a picture of our formats.  Not by Image.open, which warns of a camera's 100 megapixels.

    Raises: DecompressionBombError where decoding would take more than 1 GiB; that is 12 bytes for each of the
    MAX_IMAGE_PIXELS of Pillow, which a user may raise.  UnidentifiedImageError.
    """
    stream.seek(0)
    prefix = stream.read(16)
    Image.preinit()
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        if name not in Image.OPEN:
            continue
        reader, accepts = Image.OPEN[name]
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # what readers say to other formats
            fits = accepts is None or accepts(prefix)
            if fits and not isinstance(fits, str):  # a text says which library is missing
                stream.seek(0)
                picture = reader(stream, "")
                if math.prod(picture.size) * _bytes_of(picture) > 12 * (Image.MAX_IMAGE_PIXELS or math.inf):
                    raise Image.DecompressionBombError
                return picture
    raise UnidentifiedImageError


def _bytes_of(picture: Image.Image) -> int:
    found = _BYTES.get(picture.format or "", _AT_MOST)
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
    except UnidentifiedImageError:
        raise ImageError(f"{label} is not a picture that Pillow can read safely; convert it to PNG or JPEG") from None
    except Exception as error:  # its readers of damaged files raise anything, IndexError and struct.error too
        reason = str(error).split("<")[0].strip() or type(error).__name__  # Pillow prints addresses of objects in <>
        if isinstance(error, ValueError) and "closed" in reason:
            raise _closed(label) from None
        raise ImageError(f"cannot decode {label}: {reason}; the file is damaged or cut short") from None


def _from_pil(picture: Image.Image, label: str) -> Tensor:
    if 0 in picture.size:
        raise ImageError(f"{label} has no pixels, it is {picture.width} wide and {picture.height} high")
    if picture.mode not in (*_DIRECT, *_ALPHA):
        raise ImageError(
            f"{label} has mode {picture.mode}, whose range is not 0 to 255; convert it yourself, e.g. scale to 8 bit"
        )
    if getattr(picture, "tile", None) and getattr(picture, "fp", None) is None:  # not read yet, and nothing to read
        raise _closed(label)
    keep_freed_memory()
    picture.load()  # which turns a TIFF upright and takes the tag away
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


def from_hwc(array: np.ndarray) -> Tensor:
    """[H_px, W_px, 3] -> [3, H_px, W_px], a copy in which the colours of a pixel stay together."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)


def _from_array(array: np.ndarray, label: str) -> Tensor:
    shape = f"{label} has shape {list(array.shape)} {array.dtype}"
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        swapped = array.ndim == 3 and array.shape[0] == 3
        hint = "channels first? use a tensor, or arr.transpose(1, 2, 0)" if swapped else _remedy(array.shape)
        raise ImageError(f"an array is [height, width, 3] RGB; {shape}; {hint}")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ImageError(f"pixels are uint8, or float in 0 to 1; {shape}; scale it to 0 to 255 and convert it to uint8")
    return _in_range(from_hwc(array if array.dtype == np.uint8 else array.astype(np.float32)), label)


def _remedy(shape: Sequence[int]) -> str:
    if 0 in shape:
        return "it has no pixels; look where it comes from"
    return "a batch has four dimensions and is given alone, not in a list" if len(shape) > 3 else _REMEDY


def _from_tensor(tensor: Tensor, label: str) -> Tensor:
    shape = f"{label} has shape {list(tensor.shape)} {tensor.dtype}"
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not tensor.numel():
        swapped = tensor.ndim == 3 and tensor.shape[2] == 3
        hint = "channels last? use an array, or t.permute(2, 0, 1)" if swapped else _remedy(tensor.shape)
        raise ImageError(f"a tensor is [3, height, width] RGB; {shape}; {hint}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"pixels are uint8, or float in 0 to 1; {shape}; scale it to 0 to 255 and convert it to uint8")
    return _in_range(tensor.detach().cpu(), label)


def _in_range(image: Tensor, label: str) -> Tensor:
    """uint8 as it is, float as float32 if it lies in 0..1."""
    if image.dtype == torch.uint8:
        return image
    image = image.float()
    low, high = (float(v) for v in image.aminmax())
    if low >= 0.0 and high <= 1.0:
        return image
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError(f"{label} holds values that are not finite; float pixels lie in 0 to 1")
    guess = "is it normalised already? then call the model itself" if low < 0.0 else "is it 0 to 255? then give uint8"
    raise ImageError(f"float pixels lie in 0 to 1; {label} reaches from {low:.3g} to {high:.3g}: {guess}")
