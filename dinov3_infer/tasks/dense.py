"""Dense features of one image at any resolution: in tiles, at several scales, mirrored, and upsampled."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arrays import PLAIN
from ..errors import InputError
from ..features.result import Features
from ..images.decode import ImageLike, load_image
from ..model.network import as_map, resolve_layers

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Upsampler", "dense_features"]

# (features [1, C, h, w], normalised image [1, 3, H_px, W_px]) -> finer features [1, C, h', w']
Upsampler: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def dense_features(
    backbone: "Backbone",
    image: ImageLike,
    *,
    size: int | None = 768,
    layers: int | Sequence[int] | None = None,
    tile: int | None = None,
    overlap: float = 0.5,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    upsampler: Upsampler | None = None,
) -> Features:
    """Features of one image, with its aspect ratio kept, as a batch of 1 on the CPU.

    Args:
        backbone: the model.
        image: as in `extract_features`.
        size: pixels of the long side; None keeps the size of the image (default: 768).
        layers: as in `extract_features`; several layers are concatenated, [1, P, C * layers].
        tile: side in pixels of the square windows that the model sees, a multiple of the patch size; None shows it the
            whole image (default: None).
        overlap: share of a tile that the next tile also covers; there the tiles are blended (default: 0.5).
        scales: averages the features of the image at these multiples of `size` (default: (1.0,)).
        flip: also averages over the mirrored image (default: False).
        upsampler: a function that makes the map finer, such as AnyUp, JAFAR, LoftUp or FeatUp.  It is called once on
            the backbone's device with the map [1, C, h, w] and the normalised image [1, 3, H_px, W_px], and returns [1,
            C, h', w'].

    Returns:
        `Features`: `patch_tokens` [1, P, C] on the grid of the whole image, or of the upsampler; class token and
        registers are means over all windows.  A linear head on them gives the mean of its outputs for the windows,
        which is sliding-window inference.

    Raises:
        InputError: tiles are not whole patches, layers differ in stride, or the upsampler returns a wrong shape.  Other
            errors are those of `extract_features`.
    """
    _check(backbone.patch_size, tile, overlap, scales)
    if len(strides := {backbone.stride(layer) for layer in resolve_layers(layers, backbone.n_blocks) or [-1]}) > 1:
        raise InputError(
            f"layers={layers!r} have maps of {len(strides)} sizes, which cannot be concatenated; give one layer"
        )
    whole = load_image(image, levels=backbone.preprocess.levels, channels=backbone.preprocess.channels)
    own = size if size is not None else max(whole.shape[1:])
    shown = replace(backbone.preprocess.with_options(own, "native"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels, placement = shown.place(whole)
    stride = strides.pop()
    grid = (pixels.shape[1] // stride, pixels.shape[2] // stride)
    maps, prefixes = [], []
    for scale in scales:
        resized = pixels if scale == 1 else shown.with_options(max(1, round(own * scale))).place(whole)[0]
        for mirrored in (False, True) if flip else (False,):
            given = resized.clamp(0, 1)  # cubic filters overshoot the range
            dense, prefix = _in_tiles(backbone, given.flip(-1) if mirrored else given, layers, tile, overlap, stride)
            dense = dense.flip(-1) if mirrored else dense
            if dense.shape[1:] != grid:
                dense = F.interpolate(dense[None], size=grid, mode="bilinear", antialias=True)[0]
            maps.append(dense)
            prefixes.append(prefix)
    dense, prefix = torch.stack(maps).mean(dim=0)[None], torch.stack(prefixes).mean(dim=0)[None]
    if upsampler is not None:
        mean, std = (
            torch.tensor(v, **PLAIN).view(-1, 1, 1) for v in (backbone.preprocess.mean, backbone.preprocess.std)
        )
        dense = _upsampled(upsampler, dense.to(backbone.device), ((pixels - mean) / std)[None].to(backbone.device))
    cls_token, registers = prefix[:, 0], prefix[:, 1:]
    tokens = dense.flatten(2).mT.contiguous()
    return Features(cls_token, cls_token, registers, tokens, (dense.shape[2], dense.shape[3]), (placement,))


def _check(patch_size: int, tile: int | None, overlap: float, scales: Sequence[float]) -> None:
    if tile is not None and (tile < patch_size or tile % patch_size):
        nearest = max(1, round(tile / patch_size)) * patch_size
        raise InputError(
            f"tile is {tile} pixels and a patch {patch_size}; give a multiple of the patch, such as {nearest}"
        )
    if not 0 <= overlap < 1:
        raise InputError(f"overlap is a share of a tile, at least 0 and below 1, got {overlap}; give for example 0.5")
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise InputError(f"scales are multiples of size, got {list(scales)}; give one or more above 0, such as (1.0,)")


def _in_tiles(
    backbone: "Backbone",
    pixels: Tensor,  # [3, H_px, W_px] in 0..1, whole patches
    layers: int | Sequence[int] | None,
    tile: int | None,
    overlap: float,
    stride: int,  # of the layers, in pixels
) -> tuple[Tensor, Tensor]:
    """The map [C, h, w], and the mean of class token and registers [1 + R, C]."""
    patch, fine = backbone.patch_size, backbone.patch_size // stride
    sides = [min(tile or side, side) // patch for side in pixels.shape[1:]]  # of a tile, in patches
    grid = [side // patch for side in pixels.shape[1:]]
    starts = [_starts(length, side, overlap) for length, side in zip(grid, sides, strict=True)]
    corners = [(top, left) for top in starts[0] for left in starts[1]]
    windows = (
        pixels[:, top * patch : (top + sides[0]) * patch, left * patch : (left + sides[1]) * patch]
        for top, left in corners
    )
    h, w = (side * fine for side in sides)
    down, across = (_fade(n) if len(s) > 1 else torch.ones(n, **PLAIN) for n, s in zip((h, w), starts, strict=True))
    fade = down[:, None] * across
    total, weights, prefix = (
        torch.empty(0, **PLAIN),
        torch.zeros(*(side * fine for side in grid), **PLAIN),
        torch.empty(0, **PLAIN),
    )
    found = backbone.iter_features(windows, size=max(sides) * patch, fit="native", layers=layers)
    for (top, left), one in zip(corners, found, strict=True):
        parts = one.layers or (one,)
        tokens = torch.cat([part.patch_tokens[0] for part in parts], dim=-1)
        ahead = torch.cat([torch.cat((part.cls_token[:, None], part.register_tokens), 1)[0] for part in parts], dim=-1)
        if not total.numel():
            total, prefix = tokens.new_zeros(tokens.shape[1], *weights.shape), torch.zeros_like(ahead)
        rows, columns = slice(top * fine, top * fine + h), slice(left * fine, left * fine + w)
        total[:, rows, columns] += as_map(tokens[None], (h, w))[0] * fade
        weights[rows, columns] += fade
        prefix += ahead / len(corners)
    return total / weights, prefix


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """First patch of each tile: the fewest tiles with at least this overlap, evenly spread from end to end."""
    step = max(1, math.floor(side * (1 - overlap)))
    count = math.ceil((length - side) / step) + 1
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def _fade(side: int) -> Tensor:
    """Weight of each patch along a tile, largest in the middle and above 0."""
    return torch.sin(math.pi * (torch.arange(side, **PLAIN) + 0.5) / side) ** 2


def _upsampled(upsampler: Upsampler, dense: Tensor, pixels: Tensor) -> Tensor:
    """The map after the upsampler, checked, on the CPU."""
    with torch.no_grad():
        made = upsampler(dense, pixels)
    shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
    fits = isinstance(made, Tensor) and made.ndim == 4 and made.shape[:2] == dense.shape[:2]
    if not fits or made.shape[2] < dense.shape[2] or made.shape[3] < dense.shape[3]:
        raise InputError(
            f"the upsampler got a map {list(dense.shape)} and returned {shape}; it has to return "
            f"[1, {dense.shape[1]}, h, w] with at least {dense.shape[2]} x {dense.shape[3]}"
        )
    if not bool(made.isfinite().all()):
        raise InputError("the upsampler returned values that are not finite; run it in float32")
    return made.float().cpu()
