"""Images of more than 8 bits, as Pillow opens them: grey ones whole, colours by their high and low bytes."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ImageError
from .levels import Levels, ask_for_levels, scaled

__all__ = ["check_planes", "check_reach", "deep_colours", "deep_grey", "file_of_16_bits", "is_deep"]

_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_COLOURS = ("RGB;16", "RGBA;16", "RGBX;16", "RGBa;16", "LA;16", "CMYK;16")  # of which Pillow keeps the high bytes
_OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> what turns [H, W, 3] upright
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
_SAMPLES, _PHOTOMETRIC, _PLANES, _BITS = 277, 262, 284, 258  # tags of TIFF
_DARK = 4095  # the largest value of 12 bits: colours of 16 that do not go beyond are most likely those of a camera


def is_deep(picture: Image.Image) -> bool:
    """Whether it is grey of more than 8 bits, or floats."""
    return picture.mode in _MODES


def check_planes(picture: Image.Image, label: str) -> None:
    """Refuses a TIFF whose planes Pillow takes for 8 bits: it would be made of low and high bytes side by side.

    Raises: ImageError.
    """
    tags: Any = getattr(picture, "tag_v2", None)
    if not tags or tags.get(_PLANES, 1) != 2 or all(tile[0] != "raw" for tile in getattr(picture, "tile", ())):
        return
    if set(tags.get(_BITS, (1,))) != {8} or (tags.get(_PHOTOMETRIC) == 0 and tags.get(_SAMPLES, 1) == 1):
        raise ImageError(
            f"{label} is a TIFF with a plane for each colour, of {tags.get(_BITS, (1,))[0]} bits, which Pillow reads "
            "wrong; save it with its colours side by side (tiffcp -p contig), or compressed"
        )


def deep_grey(picture: Image.Image, label: str, levels: Levels, orientation: Callable[[], int]) -> Tensor:
    """A grey image as [3, H_px, W_px] float32 in 0..1, upright."""
    full = 65535.0 if picture.mode == "I" and picture.format in ("PPM", "PNG") else None
    tags: Any = getattr(picture, "tag_v2", None) or {}
    if picture.mode != "F" and tags.get(_BITS, (16,))[0] < 16:
        full = float(2 ** tags[_BITS][0] - 1)
    negative = picture.mode != "F" and tags.get(_PHOTOMETRIC) == 0
    picture.load()
    found = scaled(np.asarray(picture), levels, label, full)
    return _upright(np.repeat((1.0 - found if negative else found)[..., None], 3, axis=2), orientation())


def file_of_16_bits(picture: Image.Image) -> bytes | None:
    """The content of the file that an image is read from, if its colours have 16 bits and it has not been read yet."""
    stream: Any = getattr(picture, "fp", None)
    if stream is None or not any(
        raw.startswith(_COLOURS) for tile in getattr(picture, "tile", ()) for raw in _raw(tile)
    ):
        return None
    place = stream.tell()
    stream.seek(0)
    content: bytes = stream.read()
    stream.seek(place)
    return content


def check_reach(picture: Image.Image, content: bytes, label: str, opened: Callable[[Any], Image.Image]) -> None:
    """Refuses colours of 16 bits, already read as their high bytes, that would be nearly black.

    Raises: ImageError.
    """
    bands: Any = picture.getextrema()
    colours = bands[:3] if picture.mode in ("RGB", "RGBA", "CMYK") else bands[:1]
    if max(high for _, high in colours) > _DARK >> 8:
        return
    largest = int(_values(content, label, opened)[..., : len(colours)].max())
    if largest:
        raise ask_for_levels(f"{label} has colours of 16 bits that reach {largest} of 65535, and would be nearly black")


def deep_colours(
    content: bytes, label: str, levels: Levels, opened: Callable[[Any], Image.Image], orientation: Callable[[], int]
) -> Tensor:
    """Colours of 16 bits as [3, H_px, W_px] float32 in 0..1, upright, transparency laid over white."""
    values = _values(content, label, opened)
    found = scaled(values[..., :3], levels, label)
    if values.shape[2] == 4:
        share = (values[..., 3:] / 65535).astype(np.float32)
        found = found * share + (1 - share)
    return _upright(found, orientation())


def _values(content: bytes, label: str, opened: Callable[[Any], Image.Image]) -> np.ndarray:
    """[H, W, 3 or 4] uint16.  The low bytes are the high ones of the other byte order."""
    high, low = opened(io.BytesIO(content)), opened(io.BytesIO(content))
    kinds = {raw for tile in low.tile for raw in _raw(tile) if raw.startswith(_COLOURS)}  # type: ignore[attr-defined]
    planes = (getattr(low, "tag_v2", None) or {}).get(_PLANES, 1) == 2  # whose form libtiff chooses itself
    if not all(kind.startswith(("RGB;", "RGBA;", "RGBX;")) for kind in kinds) or "transparency" in low.info or planes:
        raise ImageError(
            f"{label} has 16 bits in a form ({', '.join(sorted(kinds))}) of which the low ones cannot be read; save it "
            "as RGB without transparency, its colours side by side"
        )
    low.tile = [_swapped(tile) for tile in low.tile]  # type: ignore[attr-defined]
    parts = [np.asarray(picture).astype(np.uint16) for picture in (high, low)]
    return parts[0] * 256 + parts[1]


def _raw(tile: Any) -> list[str]:
    """The texts among the arguments of a decoder, of which one is the form of the bytes."""
    return [a for a in (tile[3] if isinstance(tile[3], tuple) else (tile[3],)) if isinstance(a, str)]


def _swapped(tile: Any) -> Any:
    """A part of an image, as it is decoded from the other byte order."""

    def other(argument: Any) -> Any:
        is_form = isinstance(argument, str) and argument.startswith(_COLOURS)
        return argument[:-1] + _OTHER[argument[-1]] if is_form else argument

    arguments = tuple(map(other, tile[3])) if isinstance(tile[3], tuple) else other(tile[3])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _upright(found: np.ndarray, orientation: int) -> Tensor:
    turned = _TURNED.get(orientation, np.asarray)(found)
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
