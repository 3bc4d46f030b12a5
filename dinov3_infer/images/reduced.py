"""Pictures decoded whole, or a JPEG by its own decoder at a fraction of its size."""

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from PIL import ExifTags
from torch import Tensor

from .decode import ImageLike, load_image, open_picture

__all__ = ["Loaded", "Wanted", "decode"]

Wanted: TypeAlias = Callable[[int, int], tuple[int, int]]  # (height, width) of a picture -> what will be made of it


class Loaded(NamedTuple):
    """A picture, and its size before a decoder made it smaller."""

    image: Tensor  # [3, H_px, W_px]
    original: tuple[int, int]  # (height, width) in pixels, after EXIF rotation


def decode(picture: ImageLike, label: str, wanted: Wanted | None = None) -> Loaded:
    """Decodes any picture; with `wanted` a JPEG comes at the smallest of 1, 1/2, 1/4, 1/8 that is not below it.

    Its decoder leaves frequencies out then, so that 12 megapixels take a quarter of the time and differ a little.
    """
    small = None if wanted is None else _smaller(picture, label, wanted)
    if small is not None:
        return small
    image = load_image(picture, label)
    return Loaded(image, (image.shape[1], image.shape[2]))


def _smaller(picture: ImageLike, label: str, wanted: Wanted) -> Loaded | None:
    """None for what is no JPEG, or cannot be opened, which `load_image` puts into words."""
    if isinstance(picture, bytes):
        stream: Any = io.BytesIO(picture)
    elif isinstance(picture, (str, os.PathLike)) and os.path.isfile(picture):
        stream = None
    else:
        return None
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:  # Pillow's readers raise anything
        stream = stack.enter_context(open(picture, "rb")) if stream is None else stream
        if stream.read(2) != b"\xff\xd8":
            return None
        stream.seek(0)
        opened = stack.enter_context(open_picture(stream))  # whose limit counts whatever is made of it
        turned = opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        width, height = reversed(opened.size) if turned else opened.size
        target = wanted(height, width)
        opened.draft(None, target if turned else (target[1], target[0]))  # (width, height); keeps the mode
        return Loaded(load_image(opened, label), (height, width))
    return None
