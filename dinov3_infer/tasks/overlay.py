"""Maps over the picture that they belong to, to look at."""

import math
from collections.abc import Sequence
from functools import cache

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
from ..model.layers import cubic_kernel

__all__ = ["at_pixels", "attention_picture", "heat_colours", "overlay", "panel", "placement_of", "sheet"]

SIDES = 512, 1024  # pixels: the long side of a shown picture lies between
GAP = 8  # pixels between pictures of a sheet
WIDEST = 4096  # pixels of a sheet
# Dark violet over magenta and orange to pale yellow, in steps that look alike and get ever lighter.
_HEAT = bytes.fromhex(
    "0a07381f0d4f3712645215747016808e1684a91f79c12b69d63b56e7503df26712f8850cf9a22af9bf4df7da73f7f49c"
)


@cache
def heat_colours() -> np.ndarray:
    """256 colours from low to high, [256, 3] uint8."""
    rows = np.frombuffer(_HEAT, np.uint8).reshape(-1, 3)
    steps = np.linspace(0, len(rows) - 1, 256)
    return np.stack([np.interp(steps, range(len(rows)), row) for row in rows.T], axis=-1).round().astype(np.uint8)


def at_pixels(
    maps: Tensor,  # [K, h, w] float, a value per patch
    placement: Placement | None,  # of the picture that the patches are of; None where they cover all of it
    size: tuple[int, int],  # (height, width) of the result, which shows the whole original picture
) -> Tensor:
    """The value at every pixel, [K, height, width]: cubic between patch centres, NaN where the model saw nothing."""
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
    """Weight of each of `count` samples at positions in [0, count], where sample i lies at i + 0.5, [positions, count].

    Cubic convolution with a = -0.5, which keeps straight lines straight; edges are repeated, NaN outside.
    """
    weights = torch.zeros(len(positions), count, dtype=positions.dtype, device=positions.device)
    first = (positions - 0.5).floor().long()
    for tap in range(-1, 3):
        index = (first + tap).clamp(0, count - 1)[:, None]
        weights.scatter_add_(1, index, cubic_kernel(positions - 0.5 - (first + tap), -0.5)[:, None])
    weights[(positions < 0) | (positions > count)] = torch.nan
    return weights


def panel(image: ImageLike, levels: Levels | None = None) -> Image.Image:
    """The image upright, in a size to look at."""
    pixels = load_image(image, levels=levels)
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    long = max(picture.size)
    factor = min(max(long, SIDES[0]), SIDES[1]) / long
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def overlay(
    image: ImageLike,
    values: Tensor | np.ndarray,  # [h, w]
    placement: Placement | None = None,
    *,
    limits: tuple[float, float] | None = None,
    mark: tuple[float, float] | None = None,
) -> Image.Image:
    """The picture in grey under the map in colours, by `heat_colours`.

    `placement`: of the picture; None where the map covers all of it, as with fit "native" and "squash".
    `limits`: values of the first and the last colour; None takes the least and the largest of the map.
    `mark`: a point (x, y) in pixels of the picture, drawn as a ring.

    Raises: InputError for values of another shape.
    """
    maps = as_tensor(values, "the map")
    if maps.ndim != 2:
        raise InputError(f"overlay takes one map [h, w], got {list(maps.shape)}; give one, or the mean over heads")
    base = panel(image)
    found = at_pixels(maps[None], placement, (base.height, base.width))[0]
    low, high = limits or (float(v) for v in found[found.isfinite()].aminmax())
    span = max(high - low, 1e-5 * max(abs(low), abs(high)), 1e-12)  # a flat map is flat, not rounding made large
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
    """Where the one image of these features went.

    Raises: InputError for features of several images, or of an image of another size.
    """
    if len(features) != 1:
        raise InputError(f"these are features of {len(features)} images, and one is drawn; give features[0]")
    placement, size = features.placements[0], tuple(load_image(image).shape[1:])
    if placement.original != size:
        raise InputError(
            f"the image is {size[1]} wide and {size[0]} high, and the features are of one {placement.original[1]} wide "
            f"and {placement.original[0]} high; give the image that they were made from"
        )
    return placement


def attention_picture(
    image: ImageLike,
    maps: Tensor,  # [H, h, w], as `attention_maps` gives for one image, or [1, H, h, w]
    placement: Placement | None = None,
    mark: tuple[float, float] | None = None,  # the point that asked
) -> Image.Image:
    """The image, the mean over heads, and every head, each by its own range, up to the 99.5th percentile.

    Example:
        >>> attention_picture("cat.jpg", bb.attention_maps("cat.jpg")).save("attention.png")
    """
    if maps.ndim == 4 and len(maps) == 1:
        maps = maps[0]
    if maps.ndim != 3:
        raise InputError(f"attention_picture takes the maps of one image [heads, h, w], got {list(maps.shape)}")
    every = [maps.float().mean(dim=0), *maps.float()]
    heads = [
        overlay(image, m, placement, limits=(float(m.min()), float(np.quantile(m.cpu(), 0.995))), mark=mark)
        for m in every
    ]
    names = ["picture", "mean over heads", *(f"head {i}" for i in range(len(maps)))]
    return sheet([panel(image), *heads], names)


def sheet(pictures: Sequence[Image.Image], captions: Sequence[str] = (), columns: int | None = None) -> Image.Image:
    """Pictures in rows, each with its caption below, on white; shrunk where they would come to more than 4,096 wide.

    A last row that is not full stands in the middle.
    """
    if not pictures:
        raise InputError("sheet got no pictures; give at least one")
    if columns is None:  # about as many as rows, with few places left empty
        root = math.ceil(len(pictures) ** 0.5)
        columns = min(range(root, root + 3), key=lambda n: (-len(pictures) % n, n))
    factor = min(1.0, (WIDEST / columns - GAP) / max(picture.width for picture in pictures))
    shown = [p.resize((round(p.width * factor), round(p.height * factor))) if factor < 1 else p for p in pictures]
    width, height = max(p.width for p in shown), max(p.height for p in shown)
    text = max(14, width // 28)
    step = (width + GAP, height + GAP + (text * 3 // 2 if captions else 0))
    made = Image.new("RGB", (columns * step[0] + GAP, -(-len(shown) // columns) * step[1] + GAP), "white")
    draw, lacking = ImageDraw.Draw(made), -len(shown) % columns
    for i, picture in enumerate(shown):
        x, y = GAP + i % columns * step[0], GAP + i // columns * step[1]
        if i >= len(shown) + lacking - columns:
            x += lacking * step[0] // 2
        made.paste(picture, (x, y))
        if i < len(captions):
            draw.text((x, y + picture.height), captions[i], fill="black", font=ImageFont.load_default(text))
    return made


def _ring(picture: Image.Image, x: float, y: float) -> None:
    draw, radius = ImageDraw.Draw(picture), max(picture.size) / 60
    for colour, width in (("black", radius / 2), ("white", radius / 4)):
        box = (x - radius - width / 2, y - radius - width / 2, x + radius + width / 2, y + radius + width / 2)
        draw.ellipse(box, outline=colour, width=max(1, round(width)))
