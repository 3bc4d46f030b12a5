"""Depth and classes of a released head beside their image, with a scale or a legend below."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError
from ..images.decode import ImageLike, load_image
from ..released.windows import Colour, SegmentMap, palette
from .overlay import GAP, heat_colours, panel, sheet

__all__ = ["depth_picture", "segments_picture"]

MOST = 12  # classes in a legend
LEAST = 0.005  # share of an image that a class has to cover to be in its legend


def depth_picture(
    image: ImageLike,
    depth: Tensor | np.ndarray,  # [H_px, W_px] in metres, at the size of the image
    limits: tuple[float, float] | None = None,
) -> Image.Image:
    """The image, its depth in colours, and a scale in metres.

    `limits`: depths of the first and the last colour; None takes the nearest and the farthest of this image.

    Raises: InputError for a depth of another size.

    Example:
        >>> depth_picture("room.jpg", head.predict("room.jpg")[0].depth).save("depth.png")
    """
    values = _of_the_size(as_tensor(depth, "the depth"), image, "depths").cpu().float()
    low, high = limits or (float(values.min()), float(values.max()))
    level = ((values - low) / max(high - low, 1e-6)).clamp(0, 1).mul(255).round().to(torch.uint8)
    shown = panel(image)
    coloured = Image.fromarray(heat_colours()[level.numpy()]).resize(shown.size, Image.Resampling.BILINEAR)
    pair = sheet([shown, coloured], columns=2)
    return _above(pair, _scale(pair.width, low, high))


def segments_picture(image: ImageLike, segments: SegmentMap) -> Image.Image:
    """The image, its classes in colours, those of their data set if it has some, and a legend of the largest.

    Raises: InputError for labels of another size.

    Example:
        >>> segments_picture("room.jpg", head.predict("room.jpg")[0]).save("segments.png")
    """
    labels = _of_the_size(segments.labels, image, "labels").cpu()
    shown = panel(image)
    of_classes = segments.colours or palette(len(segments.names))
    colours = np.array(of_classes, dtype=np.uint8)[labels.numpy()]
    grey = np.asarray(shown.convert("L"), dtype=np.float32)[..., None]
    flat = np.asarray(Image.fromarray(colours).resize(shown.size, Image.Resampling.NEAREST), dtype=np.float32)
    mixed = Image.fromarray((0.35 * grey + 0.65 * flat).round().astype(np.uint8))
    shares = torch.bincount(labels.flatten(), minlength=len(segments.names)) / labels.numel()
    best = [int(i) for i in shares.argsort(descending=True, stable=True)[:MOST] if shares[i] >= LEAST]
    rows = [(of_classes[i], f"{segments.names[i]} {shares[i]:.0%}") for i in best]
    pair = sheet([shown, mixed], columns=2)
    return _above(pair, _legend(pair.width, rows))


def _of_the_size(values: Tensor, image: ImageLike, what: str) -> Tensor:
    size = tuple(load_image(image).shape[1:])
    if tuple(values.shape) != size:
        raise InputError(
            f"the {what} are {list(values.shape)} and the image {list(size)} (height, width); give those of this image"
        )
    return values


def _above(upper: Image.Image, lower: Image.Image) -> Image.Image:
    made = Image.new("RGB", (upper.width, upper.height + lower.height), "white")
    made.paste(upper, (0, 0))
    made.paste(lower, (0, upper.height))
    return made


def _text(width: int) -> int:
    """Pixels of a letter's height."""
    return max(14, width // 56)


def _scale(width: int, low: float, high: float) -> Image.Image:
    """All colours from left to right, with five depths below."""
    text = _text(width)
    bar = Image.fromarray(heat_colours()[None]).resize((width - 2 * GAP, text), Image.Resampling.BILINEAR)
    made = Image.new("RGB", (width, 3 * text + GAP), "white")
    made.paste(bar, (GAP, 0))
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(text)
    for i in range(5):
        label = f"{low + (high - low) * i / 4:.3g} m"
        spare = width - 2 * GAP - font.getlength(label)
        draw.text((GAP + spare * i / 4, text * 5 / 4), label, fill="black", font=font)
    return made


def _legend(width: int, rows: Sequence[tuple[Colour, str]]) -> Image.Image:
    """A coloured square and a name for each, in columns of one width."""
    text = _text(width)
    font = ImageFont.load_default(text)
    widest = max((font.getlength(name) for _, name in rows), default=0) + 2 * text + GAP
    columns = max(1, int((width - GAP) // widest))
    step = text * 3 // 2
    made = Image.new("RGB", (width, -(-len(rows) // columns) * step + GAP), "white")
    draw = ImageDraw.Draw(made)
    for i, (colour, name) in enumerate(rows):
        x, y = GAP + i % columns * widest, i // columns * step
        draw.rectangle((x, y, x + text, y + text), fill=colour, outline="black")
        draw.text((x + text * 3 / 2, y), name, fill="black", font=font)
    return made
