"""Which patches look like this one: a point, a box or a mask, in the same or in another picture."""

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
    """Picture by picture, batches of 1."""
    for batch in [features] if isinstance(features, Features) else features:
        yield from batch


def similarity_map(features: Features, vector: Tensor) -> Tensor:
    """Cosine of every patch with a vector [C], [B, h, w]; -1 in padding.

    With `region_vector` of the same features or of another picture's it shows where else a thing is.
    """
    if vector.shape != features.patch_tokens.shape[-1:]:
        raise InputError(
            f"the vector has shape {list(vector.shape)}, patches have {features.patch_tokens.shape[-1]} numbers; "
            "take it from features of the same model"
        )
    cosine = F.normalize(features.patch_tokens, dim=-1) @ F.normalize(vector.to(features.patch_tokens), dim=-1)
    maps: Tensor = cosine.unflatten(1, features.grid)
    return maps if features.valid is None else maps.masked_fill(~features.valid, -1.0)


def similarity_picture(
    image: ImageLike,
    features: Features,  # of this image alone
    point: tuple[float, float] | None = None,
    *,
    vector: Tensor | None = None,  # [C], such as `region_vector` of another image's features
) -> Image.Image:
    """The image, and over it in colours the cosine of every patch with the one at `point` (x, y), or with a vector.

    Raises: InputError for none or both of them, features of several images, or of an image of another size.

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
    """What a part of picture number `index` looks like, [C]: its patches at length 1, averaged by how much they hold.

    One of `point` (x, y), `box` (left, top, right, bottom), `mask` [height, width] bool, in pixels of the original
    picture.

    Raises: InputError for none or several of them, and for a part that is empty, outside or cropped away.
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
        raise InputError("the part asked for is empty or was cropped away; mark some pixels, or use fit='native'")
    tokens = F.normalize(features.patch_tokens[index], dim=-1)
    return F.normalize(weights.flatten() @ tokens, dim=0)


def patch_weights(mask: Tensor, placement: Placement, grid: tuple[int, int]) -> Tensor:
    """How much of each patch a mask [height, width] of the original picture covers, [h, w] float32 in 0..1."""
    if tuple(mask.shape) != placement.original:
        raise InputError(
            f"the mask is {list(mask.shape)} and the picture {list(placement.original)} (height, width); "
            "give it at the size of the picture, turned upright like it"
        )
    top, left, height, width = placement.window
    resized = F.interpolate(mask[None, None].float(), size=placement.resized, mode="area")[0, 0]
    seen = resized[top : top + height, left : left + width]
    seen = F.pad(seen, (0, width - seen.shape[1], 0, height - seen.shape[0]))
    return F.adaptive_avg_pool2d(seen[None], grid)[0]  # a finer grid, of an upsampler, need not divide the window


def _mask_of(box: Sequence[float], size: tuple[int, int]) -> Tensor:
    left, top, right, bottom = box
    if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
        raise InputError(
            f"a box is (left, top, right, bottom) in a picture {size[1]} wide and {size[0]} high, got {tuple(box)}"
        )
    mask = torch.zeros(size, dtype=torch.float32, device="cpu")
    mask[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = 1.0
    return mask
