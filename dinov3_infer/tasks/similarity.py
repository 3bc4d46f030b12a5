"""Which patches are similar to a point, a box or a mask, in the same image or in another one."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError
from ..features.result import Features
from ..images.decode import ImageLike
from ..images.preprocess import Placement
from .overlay import overlay, panel, placement_of, sheet

__all__ = ["each", "patch_weights", "region_vector", "similarity_map", "similarity_picture"]


def each(features: Features | Sequence[Features]) -> Iterator[Features]:
    """Splits features into batches of 1, one per image."""
    for batch in [features] if isinstance(features, Features) else features:
        yield from batch


def similarity_map(features: Features, vector: Tensor) -> Tensor:
    """Cosine similarity of every patch with a vector [C]: maps [B, h, w], with -1 in padding.

    With the vector that `region_vector` gives for another image, the map shows where the same object is in this one.

    Raises: InputError for a vector of another width.
    """
    if vector.shape != features.patch_tokens.shape[-1:]:
        raise InputError(
            f"the vector has shape {list(vector.shape)}, and patches have width {features.patch_tokens.shape[-1]}; "
            "take the vector from features of the same model"
        )
    cosine = F.normalize(features.patch_tokens, dim=-1) @ F.normalize(vector.to(features.patch_tokens), dim=-1)
    maps: Tensor = cosine.unflatten(1, features.grid)
    return maps if features.valid is None else maps.masked_fill(~features.valid, -1.0)


def similarity_picture(
    image: ImageLike,
    features: Features,  # of this image alone
    point: tuple[float, float] | None = None,
    *,
    vector: Tensor | None = None,  # [C], for example by `region_vector` from another image
) -> Image.Image:
    """Draws the image, and over it the cosine of every patch with that at `point` (x, y), or with a vector.

    Raises: InputError unless exactly one of them is given; for features of several images, or of an image of another
    size.

    Example:
        >>> similarity_picture("cat.jpg", bb.extract_features("cat.jpg", size=768, fit="native"), point=(300, 200))
    """
    placement = placement_of(image, features)
    if (point is None) == (vector is None):
        raise InputError("similarity_picture takes a point (x, y) or a vector; give exactly one")
    asked = region_vector(features, point=point) if vector is None else vector
    shown = overlay(image, similarity_map(features, asked)[0], placement, mark=point)
    return sheet([panel(image), shown], columns=2)


def region_vector(
    features: Features,
    *,
    point: tuple[float, float] | None = None,
    box: tuple[float, float, float, float] | None = None,
    mask: Tensor | np.ndarray | None = None,
    index: int = 0,
) -> Tensor:
    """One vector [C] of length 1 for a part of image number `index`: the mean of its patches, by coverage.

    Give one of `point` (x, y), `box` (left, top, right, bottom) and `mask` [height, width] bool, in pixels of the
    original image.

    Raises: InputError unless exactly one is given, and for a part that is empty, outside or cropped away.
    """
    if sum(part is not None for part in (point, box, mask)) != 1:
        raise InputError("region_vector takes one of point, box and mask; give exactly one")
    placement = features[index].placements[0]
    if point is not None:
        row, column = features.to_patch(*point, index=index)
        return F.normalize(features.feature_map[index, :, row, column], dim=0)
    if box is not None:
        mask = _mask_of(box, placement.original)
    weights = patch_weights(as_tensor(mask, "the mask").cpu(), placement, features.grid).to(features.patch_tokens)
    if features.valid is not None:
        weights = weights * features.valid[index]
    if not weights.any():
        raise InputError("the box or mask is empty or was cropped away; mark some pixels, or use fit='native'")
    tokens = F.normalize(features.patch_tokens[index], dim=-1)
    return F.normalize(weights.flatten() @ tokens, dim=0)


def patch_weights(mask: Tensor, placement: Placement, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that a mask [height, width] of the original image covers, [h, w] float32 in 0..1.

    Raises: InputError for a mask of another size.
    """
    if tuple(mask.shape) != placement.original:
        raise InputError(
            f"the mask is {list(mask.shape)} and the image {list(placement.original)} (height, width); "
            "give a mask of the size of the image after EXIF rotation"
        )
    top, left, height, width = placement.window
    resized = F.interpolate(mask[None, None].float(), size=placement.resized, mode="area")[0, 0]
    seen = resized[top : top + height, left : left + width]
    seen = F.pad(seen, (0, width - seen.shape[1], 0, height - seen.shape[0]))
    return F.adaptive_avg_pool2d(seen[None], grid)[0]  # the grid of an upsampler need not divide the window


def _mask_of(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    left, top, right, bottom = box
    if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
        raise InputError(
            f"a box is (left, top, right, bottom) inside an image of {size[1]} x {size[0]} pixels, got {tuple(box)}"
        )
    mask = torch.zeros(size, dtype=torch.float32, device="cpu")
    mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1.0
    return mask
