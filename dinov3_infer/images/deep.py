"""Images with more than 8 bits per channel: grey ones as Pillow opens them, colours from their high and low bytes."""

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
_COLOURS = ("RGB;16", "RGBA;16", "RGBX;16", "RGBa;16", "LA;16", "CMYK;16")  # Pillow keeps only their high bytes
_OTHER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # EXIF orientation -> function that makes [H, W, 3] upright
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
_SAMPLES, _PHOTOMETRIC, _PLANES, _BITS = 277, 262, 284, 258  # TIFF tags
_DARK = 4095  # largest 12-bit value: 16-bit colours up to here most likely hold 12-bit values of a camera


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits, or holds floats."""
    return image.mode in _MODES


def check_planes(image: Image.Image, label: str) -> None:
    """Refuse a TIFF with separate planes that Pillow takes for 8 bits: it would show low and high bytes side by side.

    Raises:
        ImageError: The file is such a TIFF.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if not tags or tags.get(_PLANES, 1) != 2 or all(tile[0] != "raw" for tile in getattr(image, "tile", ())):
        return
    if set(tags.get(_BITS, (1,))) != {8} or (tags.get(_PHOTOMETRIC) == 0 and tags.get(_SAMPLES, 1) == 1):
        raise ImageError(
            f"{label} is a TIFF with one plane per colour of {tags.get(_BITS, (1,))[0]} bits, which Pillow reads "
            "wrongly; save it with interleaved colours (tiffcp -p contig), or compressed"
        )


def deep_grey(image: Image.Image, label: str, levels: Levels, orientation: Callable[[], int]) -> Tensor:
    """Scale a grey image to [3, H_px, W_px] float32 in 0..1, upright.

    Raises:
        ImageError: `levels` do not fit the values, see `scaled`.
    """
    full = 65535.0 if image.mode == "I" and image.format in ("PPM", "PNG") else None
    tags: Any = getattr(image, "tag_v2", None) or {}
    if image.mode != "F" and tags.get(_BITS, (16,))[0] < 16:
        full = float(2 ** tags[_BITS][0] - 1)
    negative = image.mode != "F" and tags.get(_PHOTOMETRIC) == 0
    image.load()
    found = scaled(np.asarray(image), levels, label, full)
    return _upright(np.repeat((1.0 - found if negative else found)[..., None], 3, axis=2), orientation())


def file_of_16_bits(image: Image.Image) -> bytes | None:
    """Content of the file behind an image if its colours have 16 bits and its pixels were not read yet, else None."""
    stream: Any = getattr(image, "fp", None)
    if stream is None or not any(raw.startswith(_COLOURS) for tile in getattr(image, "tile", ()) for raw in _raw(tile)):
        return None
    place = stream.tell()
    stream.seek(0)
    content: bytes = stream.read()
    stream.seek(place)
    return content


def check_reach(image: Image.Image, content: bytes, label: str, opened: Callable[[Any], Image.Image]) -> None:
    """Refuse 16-bit colours, already read as their high bytes, that would be nearly black.

    Raises:
        ImageError: No value is above 4095 of 65535.
    """
    bands: Any = image.getextrema()
    colours = bands[:3] if image.mode in ("RGB", "RGBA", "CMYK") else bands[:1]
    if max(high for _, high in colours) > _DARK >> 8:
        return
    largest = int(_values(content, label, opened)[..., : len(colours)].max())
    if largest:
        raise ask_for_levels(f"{label} has 16-bit colours up to {largest} of 65535, which would look nearly black")


def deep_colours(
    content: bytes, label: str, levels: Levels, opened: Callable[[Any], Image.Image], orientation: Callable[[], int]
) -> Tensor:
    """Scale 16-bit colours to [3, H_px, W_px] float32 in 0..1, upright, with transparency composited over white.

    Raises:
        ImageError: The low bytes cannot be read, or `levels` do not fit the values.
    """
    values = _values(content, label, opened)
    found = scaled(values[..., :3], levels, label)
    if values.shape[2] == 4:
        share = (values[..., 3:] / 65535).astype(np.float32)
        found = found * share + (1 - share)
    return _upright(found, orientation())


def _values(content: bytes, label: str, opened: Callable[[Any], Image.Image]) -> np.ndarray:
    """[H, W, 3 or 4] uint16; decoding with the other byte order gives the low bytes."""
    high, low = opened(io.BytesIO(content)), opened(io.BytesIO(content))
    kinds = {raw for tile in low.tile for raw in _raw(tile) if raw.startswith(_COLOURS)}  # type: ignore[attr-defined]
    planes = (getattr(low, "tag_v2", None) or {}).get(_PLANES, 1) == 2  # libtiff chooses their form
    if not all(kind.startswith(("RGB;", "RGBA;", "RGBX;")) for kind in kinds) or "transparency" in low.info or planes:
        raise ImageError(
            f"{label} has 16-bit colours in a form ({', '.join(sorted(kinds))}) whose low bytes cannot be read; "
            "save it as RGB without transparency, with interleaved colours"
        )
    low.tile = [_swapped(tile) for tile in low.tile]  # type: ignore[attr-defined]
    parts = [np.asarray(image).astype(np.uint16) for image in (high, low)]
    return parts[0] * 256 + parts[1]


def _raw(tile: Any) -> list[str]:
    """Strings among the arguments of a decoder; one of them is the raw mode."""
    return [a for a in (tile[3] if isinstance(tile[3], tuple) else (tile[3],)) if isinstance(a, str)]


def _swapped(tile: Any) -> Any:
    """A tile that decodes from the other byte order."""

    def other(argument: Any) -> Any:
        is_form = isinstance(argument, str) and argument.startswith(_COLOURS)
        return argument[:-1] + _OTHER[argument[-1]] if is_form else argument

    arguments = tuple(map(other, tile[3])) if isinstance(tile[3], tuple) else other(tile[3])
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _upright(found: np.ndarray, orientation: int) -> Tensor:
    turned = _TURNED.get(orientation, np.asarray)(found)
    return torch.from_numpy(np.ascontiguousarray(turned)).permute(2, 0, 1)
