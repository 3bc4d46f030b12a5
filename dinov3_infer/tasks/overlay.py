"""Draws maps over their images."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError
from ..features.result import Features
from ..images.decode import ImageLike, load_image
from ..images.levels import Levels
from ..images.preprocess import Placement
from ..model.positions import cubic_kernel

__all__ = ["at_pixels", "attention_picture", "heat_colours", "overlay", "panel", "placement_of", "sheet"]

SIDES = 512, 1024  # pixels: range of the long side of a shown image
GAP = 8  # pixels between the images of a sheet
WIDEST = 4096  # pixels: largest width of a sheet
# Dark violet, magenta, orange, pale yellow: perceptually even steps that get lighter.
_HEAT = bytes.fromhex(
    "0a07381f0d4f3712645215747016808e1684a91f79c12b69d63b56e7503df26712f8850cf9a22af9bf4df7da73f7f49c"
)


@cache
def heat_colours() -> np.ndarray:
    """Colours of the heat map from low to high, [256, 3] uint8."""
    rows = np.frombuffer(_HEAT, np.uint8).reshape(-1, 3)
    steps = np.linspace(0, len(rows) - 1, 256)
    return np.stack([np.interp(steps, range(len(rows)), row) for row in rows.T], axis=-1).round().astype(np.uint8)


def at_pixels(
    maps: Tensor,  # [K, h, w] float, one value per patch
    placement: Placement | None,  # of the image; None if the patches cover all of it
    size: tuple[int, int],  # (height, width) of the result, which shows the whole original image
) -> Tensor:
    """Interpolates values to pixels, [K, height, width]: cubic between patch centres, NaN outside the model input."""
    placement = placement or Placement((1, 1), (1, 1), (0, 0, 1, 1))
    weights = []
    for axis in (0, 1):
        centres = (
            (torch.arange(size[axis], dtype=torch.float64, device="cpu") + 0.5) / size[axis] * placement.resized[axis]
        )
        count, extent = maps.shape[axis + 1], placement.window[axis + 2]
        weights.append(_cubic((centres - placement.window[axis]) / extent * count, count))
    return (weights[0] @ maps.cpu().double() @ weights[1].T).float()


def _cubic(positions: Tensor, count: int) -> Tensor:
    """Weights [positions, count] of samples at positions in [0, count], where sample i lies at i + 0.5.

    Cubic convolution with a = -0.5, which reproduces straight lines.  Edges are repeated; outside it gives NaN.
    """
    weights = torch.zeros(len(positions), count, dtype=positions.dtype, device=positions.device)
    first = (positions - 0.5).floor().long()
    for tap in range(-1, 3):
        index = (first + tap).clamp(0, count - 1)[:, None]
        weights.scatter_add_(1, index, cubic_kernel(positions - 0.5 - (first + tap), -0.5)[:, None])
    weights[(positions < 0) | (positions > count)] = torch.nan
    return weights


def panel(image: ImageLike, levels: Levels | None = None) -> Image.Image:
    """The image, upright, with a long side of 512 to 1,024 pixels."""
    pixels = load_image(image, levels=levels)
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    shown = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    long = max(shown.size)
    factor = min(max(long, SIDES[0]), SIDES[1]) / long
    width, height = (max(1, round(side * factor)) for side in shown.size)
    return shown.resize((width, height), Image.Resampling.LANCZOS)


def overlay(
    image: ImageLike,
    values: Tensor | np.ndarray,  # [h, w]
    placement: Placement | None = None,
    *,
    limits: tuple[float, float] | None = None,
    mark: tuple[float, float] | None = None,
) -> Image.Image:
    """Draws a map in colours over the image in grey.

    Args:
        image: as in `extract_features`.
        values: the map, [h, w].
        placement: that of the image; None if the map covers the whole image, as with fit "native" and "squash".
        limits: values of the first and the last colour (default: minimum and maximum of the map).
        mark: a point (x, y) in pixels of the image, drawn as a ring.

    Returns:
        A PIL image.

    Raises:
        InputError: `values` is not one map.
    """
    maps = as_tensor(values, "the map")
    if maps.ndim != 2:
        raise InputError(f"overlay takes one map [h, w], got {list(maps.shape)}; give one map, or the mean over heads")
    base = panel(image)
    found = at_pixels(maps[None], placement, (base.height, base.width))[0]
    low, high = limits or (float(v) for v in found[found.isfinite()].aminmax())
    span = max(high - low, 1e-5 * max(abs(low), abs(high)), 1e-12)  # keeps rounding noise of a flat map small
    level = ((found - low) / span).clamp(0, 1).numpy()
    seen = np.isfinite(level)
    colours = heat_colours()[np.where(seen, level * 255, 0).round().astype(int)]
    grey = np.asarray(base.convert("L"), dtype=np.float32)[..., None]
    mixed = np.where(seen[..., None], 0.35 * grey + 0.65 * colours, 0.5 * grey)
    shown = Image.fromarray(mixed.round().astype(np.uint8))
    if mark is not None:
        height, width = load_image(image).shape[1:]
        _ring(shown, mark[0] * shown.width / width, mark[1] * shown.height / height)
    return shown


def placement_of(image: ImageLike, features: Features) -> Placement:
    """The placement of the one image of these features.

    Raises: InputError for features of several images, or of an image of another size.
    """
    if len(features) != 1:
        raise InputError(f"the drawing shows one image, got features of {len(features)} images; give features[0]")
    placement, size = features.placements[0], tuple(load_image(image).shape[1:])
    if placement.original != size:
        raise InputError(
            f"the image is {size[1]} x {size[0]} pixels, but the features are of an image of {placement.original[1]} x "
            f"{placement.original[0]} pixels; give the image of these features"
        )
    return placement


def attention_picture(
    image: ImageLike,
    maps: Tensor,  # [H, h, w], as `attention_maps` gives for one image, or [1, H, h, w]
    placement: Placement | None = None,
    mark: tuple[float, float] | None = None,  # the query point (x, y)
) -> Image.Image:
    """Draws the image, the mean over heads, and every head; each map spans its own range up to the 99.5th percentile.

    Raises: InputError for maps of several images.

    Example:
        >>> attention_picture("cat.jpg", bb.attention_maps("cat.jpg")).save("attention.png")
    """
    if maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    if maps.ndim != 3:
        raise InputError(
            f"attention_picture takes the maps of one image [heads, h, w], got {list(maps.shape)}; give maps[0]"
        )
    every = [maps.float().mean(dim=0), *maps.float()]
    heads = [
        overlay(image, m, placement, limits=(float(m.min()), float(np.quantile(m.cpu(), 0.995))), mark=mark)
        for m in every
    ]
    names = ["image", "mean over heads", *(f"head {i}" for i in range(len(maps)))]
    return sheet([panel(image), *heads], names)


def sheet(images: Sequence[Image.Image], captions: Sequence[str] = (), columns: int | None = None) -> Image.Image:
    """Arranges images in rows on white, each centred in its cell with its caption below.

    Images shrink if a row is wider than 4,096 pixels; a long caption is shortened in the middle; the last row is
    centred.

    Raises: InputError if there are no images.
    """
    if not images:
        raise InputError("sheet got no images; give at least one")
    if columns is None:  # about as many columns as rows, with few empty places
        root = math.ceil(len(images) ** 0.5)
        columns = min(range(root, root + 3), key=lambda n: (-len(images) % n, n))
    factor = min(1.0, (WIDEST / columns - GAP) / max(image.width for image in images))
    shown = [p.resize((round(p.width * factor), round(p.height * factor))) if factor < 1 else p for p in images]
    width, height = max(p.width for p in shown), max(p.height for p in shown)
    text = max(14, width // 28)
    step = (width + GAP, height + GAP + (text * 3 // 2 if captions else 0))
    made = Image.new("RGB", (columns * step[0] + GAP, -(-len(shown) // columns) * step[1] + GAP), "white")
    draw, lacking = ImageDraw.Draw(made), -len(shown) % columns
    for i, image in enumerate(shown):
        x, y = GAP + i % columns * step[0], GAP + i // columns * step[1]
        if i >= len(shown) + lacking - columns:
            x += lacking * step[0] // 2
        made.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        if i < len(captions):
            font = ImageFont.load_default(text)
            draw.text((x, y + height), _shortened(captions[i], font, width), fill="black", font=font)
    return made


def _shortened(caption: str, font: Any, width: int) -> str:
    """Shortens a caption in the middle until it is as narrow as its image."""
    kept = len(caption)
    while kept > 4 and font.getlength(shown := _without_middle(caption, kept)) > width:
        kept -= 1
    return caption if kept == len(caption) else shown


def _without_middle(text: str, kept: int) -> str:
    return text if kept >= len(text) else f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def _ring(image: Image.Image, x: float, y: float) -> None:
    draw, radius = ImageDraw.Draw(image), max(image.size) / 60
    for colour, width in (("black", radius / 2), ("white", radius / 4)):
        box = (x - radius - width / 2, y - radius - width / 2, x + radius + width / 2, y + radius + width / 2)
        draw.ellipse(box, outline=colour, width=max(1, round(width)))
