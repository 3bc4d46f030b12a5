"""A web page in one file: point at a patch, and see which patches of all images are similar to it.

Tokens are scaled to length 1, rotated onto their principal axes and stored in whole steps of 0.0025.  The rotation
keeps every cosine, and most axes then take few values, which compress well.
"""

import base64
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..backbone import Backbone
from ..errors import InputError, UnsupportedError
from ..features.result import Features
from ..images.decode import ImageLike, load_image
from ..images.preprocess import Fit
from ..system import whole
from .overlay import heat_colours
from .pca import pca_rgb

__all__ = ["STEP", "Explored", "explore", "largest_error", "pack"]

STEP = 0.0025  # step of stored values: cosines differ by at most 0.006 in 9e8 pairs of real tokens
SAMPLE = 512  # patches that are compared with all others to measure the error
QUALITY = 85  # of the JPEGs


@dataclass(frozen=True)
class Explored:
    """What `explore` wrote."""

    path: Path
    patches: int  # number of patches of all images
    error: float  # largest difference of a stored cosine from the exact one, over `pairs`
    pairs: int


def explore(
    backbone: Backbone,
    images: Sequence[ImageLike],
    out: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    size: int | tuple[int, int] | None = 768,
    fit: Fit = "native",
) -> Explored:
    """Writes a page that shows how similar each patch of all images is to the patch under the pointer.

    The page also shows the principal components of the patches and the attention of the class token.  It needs no
    server and no network, and contains the images as JPEGs.

    Args:
        backbone: the model.
        images: paths or images, as in `extract_features`.
        out: the .html file to write.
        names: captions (default: the file names, or numbers).
        size: as in `extract_features` (default: 768).
        fit: "native", "squash" or "crop" (default: "native").

    Returns:
        `Explored`: the path, the number of patches, and the error of the stored cosines.

    Raises:
        InputError: there is no image, `fit` is "pad", or `names` has another length than `images`.  Other errors are
            those of `extract_features`.

    Example:
        >>> explore(bb, ["cat.jpg", "dog.jpg"], "explore.html")
    """
    if fit == "pad":
        raise InputError("explore does not show padding, got fit='pad'; give fit='native', 'squash' or 'crop'")
    if not len(images):
        raise InputError("explore got no images; give at least one")
    names = [_name(image, number) for number, image in enumerate(images)] if names is None else names
    if len(names) != len(images):
        raise InputError(f"explore got {len(images)} images and {len(names)} names; give one name per image")
    features = list(backbone.iter_features(images, size=size, fit=fit))
    tokens = torch.cat([found.patch_tokens[0] for found in features]).float()
    packed, colours = pack(tokens), pca_rgb(features)
    error, pairs = largest_error(tokens, packed, SAMPLE)
    shown = [
        {
            "name": name,
            "h": found.grid[0],
            "w": found.grid[1],
            "jpeg": _base64(_jpeg(image, found)),
            "pca": _base64(colour.tobytes()),
            "attention": _attention(backbone, image, size, fit),
        }
        for image, name, found, colour in zip(images, names, features, colours, strict=True)
    ]
    model = backbone.info.name if backbone.info else "a model without a name"
    about = (
        f"Patch features of {model}: {len(tokens):,} patches, images: {len(images)}. "
        f"They are stored in whole steps: the largest error of a cosine over {pairs:,} pairs is {error:.4f}. "
        "PCA: the first three principal components of all patches, as red, green and blue. Attention: of the class "
        "token in the last block, the mean over heads."
    )
    data = {
        "width": tokens.shape[1], "step": STEP, "low": _typical(tokens), "about": about, "images": shown,
        "heat": _base64(heat_colours().tobytes()), "tokens": _base64(_compressed(packed)),
    }  # fmt: skip
    template = (files("dinov3_infer") / "data" / "explore" / "page.html").read_text(encoding="utf-8")
    page = template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))  # a name cannot end the script
    path = Path(out).expanduser()
    with whole(path) as beside:
        beside.write_text(page, encoding="utf-8")
    return Explored(path, len(tokens), error, pairs)


def pack(tokens: Tensor) -> np.ndarray:  # [N, C] float
    """Tokens as whole numbers, [N, C] int16: the cosine of rows a and b is about STEP**2 * (a @ b)."""
    unit = F.normalize(tokens.double(), dim=1)
    _, axes = torch.linalg.eigh(unit.T @ unit)
    found: np.ndarray = ((unit @ axes) / STEP).round().to(torch.int16).numpy()
    return found


def largest_error(tokens: Tensor, packed: np.ndarray, rows: int | None = None) -> tuple[float, int]:
    """The largest difference between a stored and the exact cosine of tokens [N, C], and the number of pairs compared.

    `rows`: compares this many evenly spaced rows with all rows; None compares every pair.
    """
    unit, stored = F.normalize(tokens.float(), dim=1), torch.from_numpy(packed).float()
    count = len(unit) if rows is None else min(rows, len(unit))
    picked = torch.linspace(0, len(unit) - 1, count).long()
    differences = (unit[part] @ unit.T - stored[part] @ stored.T * STEP**2 for part in picked.split(256))
    return max(float(one.abs().max()) for one in differences), count * len(unit)


def _compressed(packed: np.ndarray) -> bytes:
    """Axis by axis, first the low bytes, then the high bytes, which are nearly all equal."""
    planes = np.ascontiguousarray(packed.T).view(np.uint16)
    low, high = (planes & 255).astype(np.uint8), (planes >> 8).astype(np.uint8)
    return zlib.compress(low.tobytes() + high.tobytes(), 9)


def _typical(tokens: Tensor) -> float:
    """The median cosine of two patches, where the colour scale begins."""
    unit = F.normalize(tokens[:: max(1, len(tokens) // 1000)], dim=1)
    return min(0.95, max(-1.0, float((unit @ unit.T).median())))


def _jpeg(image: ImageLike, found: Features) -> bytes:
    """The part of an image that the model saw."""
    (placement,) = found.placements
    pixels = load_image(image)
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    height, width = placement.resized
    seen = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).resize(
        (width, height), Image.Resampling.LANCZOS
    )
    top, left, height, width = placement.window
    packed = io.BytesIO()
    seen.crop((left, top, left + width, top + height)).save(packed, "JPEG", quality=QUALITY)
    return packed.getvalue()


def _attention(backbone: Backbone, image: ImageLike, size: int | tuple[int, int] | None, fit: Fit) -> str | None:
    """[h, w] uint8, up to the 99.5th percentile; None for a network without attention."""
    try:
        mean = backbone.attention_maps(image, size=size, fit=fit)[0].float().mean(dim=0).cpu()
    except UnsupportedError:
        return None
    high = max(float(np.quantile(mean, 0.995)), 1e-12)
    return _base64((mean / high * 255).clamp(0, 255).round().to(torch.uint8).numpy().tobytes())


def _name(image: ImageLike, number: int) -> str:
    return os.path.basename(os.fspath(image)) if isinstance(image, str | os.PathLike) else f"image {number}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
