"""Patch features as colours: three principal components become red, green and blue."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError
from ..features.components import colours, project
from ..features.result import Features
from ..images.decode import ImageLike
from ..images.preprocess import Placement
from .overlay import at_pixels, panel, placement_of, sheet
from .similarity import each

__all__ = ["foreground", "pca_picture", "pca_rgb"]


def pca_rgb(
    features: Features | Sequence[Features], masks: Sequence[Tensor | np.ndarray] | None = None
) -> list[np.ndarray]:
    """Colours [h, w, 3] uint8 for each image, one pixel per patch, by components fitted to all images together.

    Equal colours mean similar features across images.  Signs are fixed: the first component is low at the borders, so
    the middle is red; for the others see `project`.  Each channel spans the 1st to the 99th percentile.

    Args:
        features: of one or more images.
        masks: bool [h, w] per image, the patches to use, such as `foreground` gives; all other patches, and padding,
            are black (default: all patches).

    Returns:
        One array per image.

    Raises:
        InputError: there are fewer than 3 patches, or the masks have other shapes than the grids.

    Source: DINOv2 paper (arXiv 2304.07193), section 7.5.
    """
    counted = _counted(features, masks)
    found = torch.from_numpy(colours(_components(features, counted, 3)))
    return [image.numpy() for image in _on_grids(found, counted)]


def foreground(features: Features | Sequence[Features]) -> list[np.ndarray]:
    """The patches of the main object of each image, bool [h, w].

    They are one side of the first component of all images together: the side that touches the borders less.

    Raises: InputError for fewer than 3 patches.

    Source: DINOv2 paper (arXiv 2304.07193), section 7.5, which chooses the side by hand.
    """
    counted = _counted(features, None)
    return [mask.numpy() for mask in _on_grids(_components(features, counted, 1)[:, 0] > 0, counted)]


def _components(features: Features | Sequence[Features], counted: Sequence[Tensor], count: int) -> Tensor:
    """Components of all patches in use, in order, [P, count]; the first is low at the borders of the used part."""
    patches = (one.patch_tokens[0].detach().cpu().float() for one in each(features))
    tokens = torch.cat([p[mask.flatten()] for p, mask in zip(patches, counted, strict=True)])
    if len(tokens) < 3:
        raise InputError(f"three components need at least 3 patches, got {len(tokens)}; give a larger image or mask")
    projected = project(tokens, count)
    at_border = torch.cat([_border(mask)[mask] for mask in counted])
    if projected[at_border, 0].mean() > 0:
        projected[:, 0] *= -1
    return projected


def _border(mask: Tensor) -> Tensor:
    """[h, w] bool: patches of a mask with a neighbour outside of it."""
    around = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])


def _on_grids(values: Tensor, counted: Sequence[Tensor]) -> list[Tensor]:
    """Splits [P, ...] into one [h, w, ...] per image, zero for patches that are not in use."""
    maps, start = [], 0
    for mask in counted:
        found = values.new_zeros((*mask.shape, *values.shape[1:]))
        found[mask] = values[start : start + int(mask.sum())]
        start += int(mask.sum())
        maps.append(found)
    return maps


def _counted(features: Features | Sequence[Features], masks: Sequence[Tensor | np.ndarray] | None) -> list[Tensor]:
    """One bool [h, w] per image: the patches in use."""
    every = [
        torch.ones(f.grid, dtype=torch.bool, device="cpu") if f.valid is None else f.valid[0].cpu()
        for f in each(features)
    ]
    if not every:
        raise InputError("there are no features; give the result of extract_features")
    if masks is None:
        return every
    given = [as_tensor(mask, "a mask").cpu() for mask in masks]
    if [m.shape for m in given] != [m.shape for m in every] or any(m.dtype != torch.bool for m in given):
        raise InputError(
            f"masks are bool, one for each of {len(every)} images, of the shapes {[tuple(m.shape) for m in every]}; "
            f"got {[(str(m.dtype), tuple(m.shape)) for m in given]}"
        )
    return [a & b for a, b in zip(every, given, strict=True)]


def pca_picture(
    image: ImageLike,
    features: Features | np.ndarray,  # of this image alone, or its colours [h, w, 3] uint8
    placement: Placement | None = None,  # of the image, if colours are given; None if they cover all of it
) -> Image.Image:
    """Draws the image beside the colours of its patches, smoothly enlarged.

    Raises: InputError for features of several images, or of an image of another size.

    Example:
        >>> pca_picture("cat.jpg", bb.extract_features("cat.jpg", size=768, fit="native")).save("pca.png")
    """
    if isinstance(features, Features):
        placement = placement_of(image, features)
        features = pca_rgb(features)[0]
    shown = panel(image)
    enlarged = at_pixels(torch.from_numpy(features).permute(2, 0, 1), placement, (shown.height, shown.width))
    pixels = enlarged.nan_to_num(0).clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return sheet([shown, Image.fromarray(pixels)], columns=2)
