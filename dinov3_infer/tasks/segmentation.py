"""A class for every pixel: from a few marked images, or by a linear layer trained on many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..arrays import PLAIN, as_tensor
from ..errors import InputError
from ..features.result import Features
from .fitted import Fitted, descend
from .overlay import at_pixels
from .similarity import each, patch_weights

__all__ = ["IGNORE", "OneShotSegmenter", "SegmentationHead", "Segmenter"]

Masks: TypeAlias = Tensor | np.ndarray | Sequence[Tensor | np.ndarray]
IGNORE = 255  # in a mask: the class of this pixel is not known
CHUNK = 8  # classes that are interpolated at a time


class Segmenter(Fitted):
    """Base of the segmenters: learns from features and masks, and gives a class for every pixel of the original image.

    A mask is [height, width] of the original image, bool or whole numbers: 0 is the background, 255 is ignored.
    """

    def fit(self, features: Features | Sequence[Features], masks: Masks) -> Self:
        """Learns from the features of one or more images, and one mask [height, width] per image.

        Raises: InputError for another number, size or dtype of masks, and for masks with a single class.
        """
        self.tensors = self._fit(*_examples(features, masks))
        return self

    def predict(self, features: Features | Sequence[Features]) -> list[Tensor]:
        """The class of every pixel, one [height, width] int64 per image; 255 where fit="crop" cropped the image.

        Raises: InputError before `fit`, and for features of another width.
        """
        found = []
        for one in each(features):
            maps = self._maps(one)
            size = one.placements[0].original
            best, labels = torch.full(size, -torch.inf, **PLAIN), torch.full(size, IGNORE, device="cpu")
            for start in range(0, len(maps), CHUNK):
                values, index = at_pixels(maps[start : start + CHUNK], one.placements[0], size).max(dim=0)
                better = values > best  # false for NaN
                best, labels = torch.where(better, values, best), torch.where(better, index + start, labels)
            found.append(labels)
        return found

    def scores(self, features: Features | Sequence[Features]) -> list[Tensor]:
        """The score of each class at every pixel, one [K, height, width] float32 per image.  Raises: as `predict`."""
        return [at_pixels(self._maps(one), one.placements[0], one.placements[0].original) for one in each(features)]

    def _maps(self, features: Features) -> Tensor:
        self._check(features.patch_tokens.shape[-1])
        maps: Tensor = self._score(features.patch_tokens[0].to(self._device).float()).T.unflatten(1, features.grid)
        return maps.cpu()

    def _fit(self, features: list[Features], masks: list[Tensor], num_classes: int) -> dict[str, Tensor]:
        raise NotImplementedError

    def _score(self, tokens: Tensor) -> Tensor:  # [P, C] -> [P, K]
        raise NotImplementedError


@dataclass(repr=False, eq=False)
class OneShotSegmenter(Segmenter):
    """Finds the marked regions of one or a few reference images in other images.

    Each patch gets the class whose mean patch in the references has the largest cosine with it.
    """

    names = ("prototypes",)
    shapes = ("K C",)

    def _fit(self, features: list[Features], masks: list[Tensor], num_classes: int) -> dict[str, Tensor]:
        shares = torch.cat([_shares(one, mask, num_classes) for one, mask in zip(features, masks, strict=True)])
        patches = torch.cat([F.normalize(one.patch_tokens[0].cpu().float(), dim=-1) for one in features])
        if int(shares.any(dim=0).sum()) < 2:
            raise InputError("the marked part was cropped away; use fit='native', or mark more of the image")
        known = shares.any(dim=1)
        return {"prototypes": F.normalize(shares[known].T @ patches[known], dim=-1)}

    def _score(self, tokens: Tensor) -> Tensor:
        prototypes = self.tensors["prototypes"]
        found = F.normalize(tokens, dim=-1) @ prototypes.T
        return found.masked_fill(~prototypes.any(dim=1), -1.0)  # a class number that no mask uses


@dataclass(repr=False, eq=False)
class SegmentationHead(Segmenter):
    """A linear layer on each patch, trained on pixels.

    Each step draws pixels from all images and takes the cross-entropy of their scores, interpolated bilinearly between
    patches: a sample of the loss of scores enlarged to the mask.  `dense_features` gives sliding-window inference.

    Source: the linear ADE20K protocol of DINOv2 and DINOv3, reference code: batch norm (here with the exact mean and
    deviation of all patches, folded into the layer), weights from N(0, 0.01), AdamW with these rates, warm-up and
    cosine.  The reference draws crops and drops channels; this head trains on cached features.
    """

    steps: int = 2000
    pixels: int = 1024  # per step
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    seed: int = 0

    names = ("weight", "bias")
    shapes = ("K C", "K")

    def predict_proba(self, features: Features | Sequence[Features]) -> list[Tensor]:
        """The class probabilities at every pixel, one [K, height, width] float32 per image.  Raises: as `predict`."""
        return [one.softmax(dim=0) for one in self.scores(features)]

    def _fit(self, features: list[Features], masks: list[Tensor], num_classes: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.cat([one.patch_tokens[0].float() for one in features])
        seen = tokens[torch.cat([_shares(f, m, num_classes).any(dim=1) for f, m in zip(features, masks, strict=True)])]
        mean, std = seen.mean(dim=0), seen.std(dim=0, correction=0).clamp(min=1e-5)
        draw = _Pixels(features, masks)
        weight = (
            (torch.randn(num_classes, len(mean), generator=generator, **PLAIN) * 0.01).to(mean.device).requires_grad_()
        )
        bias = torch.zeros_like(weight[:, 0]).requires_grad_()

        def loss() -> Tensor:
            rows, shares, targets = (part.to(mean.device) for part in draw(self.pixels, generator))
            x = (torch.einsum("nt,ntc->nc", shares, tokens[rows]) - mean) / std
            total = F.cross_entropy(F.linear(x, weight, bias), targets, ignore_index=IGNORE, reduction="sum")
            return total / (targets != IGNORE).sum().clamp(min=1)

        descend([weight, bias], [self.weight_decay] * 2, self.steps, self.learning_rate, 0.04, loss)
        folded = weight.detach() / std
        return {"weight": folded, "bias": bias.detach() - folded @ mean}

    def _score(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.tensors["weight"], self.tensors["bias"])


class _Pixels:
    """Draws pixels of many images, the same number from each on average, from the part that the model saw."""

    def __init__(self, features: list[Features], masks: list[Tensor]) -> None:
        self.labels = torch.cat([mask.flatten().to(torch.uint8) for mask in masks])
        first = torch.tensor([0, *(mask.numel() for mask in masks[:-1])], device="cpu").cumsum(0)
        patches = torch.tensor([0, *(math.prod(one.grid) for one in features[:-1])], device="cpu").cumsum(0)
        rows = []
        for (
            one
        ) in features:  # per axis: window start and length, share of it with image, resized and original size, patches
            place = one.placements[0]
            for axis in (0, 1):
                start, length, resized = place.window[axis], place.window[axis + 2], place.resized[axis]
                seen = min(length, resized - start) / length
                rows.append((start, length, seen, resized, place.original[axis], one.grid[axis]))
        self.first, self.patches = first, patches
        self.axes = torch.tensor(rows, dtype=torch.float64, device="cpu").view(len(features), 2, 6)

    def __call__(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The 4 patches around each pixel [count, 4], their weights [count, 4], and labels [count]."""
        image = torch.randint(len(self.axes), (count,), generator=generator, device="cpu")
        start, length, seen, resized, size, patches = self.axes[image].unbind(-1)  # [count, 2] each
        at = torch.rand(count, 2, generator=generator, dtype=torch.float64, device="cpu") * seen
        pixel = ((at * length + start) / resized * size).floor().clamp(max=size - 1).long()
        labels = self.labels[self.first[image] + pixel[:, 0] * size[:, 1].long() + pixel[:, 1]].long()
        place = (at * patches - 0.5).clamp(min=0)
        low = place.floor().clamp(max=patches - 1)
        high, share = (low + 1).clamp(max=patches - 1), place - low
        ends = [(low, 1 - share), (high, share)]
        rows = [v[:, 0] * patches[:, 1] + h[:, 1] for v, _ in ends for h, _ in ends]
        weights = [v[:, 0] * h[:, 1] for _, v in ends for _, h in ends]
        return torch.stack(rows, 1).long() + self.patches[image][:, None], torch.stack(weights, 1).float(), labels


def _shares(features: Features, mask: Tensor, num_classes: int) -> Tensor:
    """Share of each class in each patch, [P, K]; rows are 0 where less than half of the patch has a label."""
    place = features.placements[0]
    shares = torch.stack([patch_weights(mask == c, place, features.grid).flatten() for c in range(num_classes)], dim=1)
    known = shares.sum(dim=1, keepdim=True)
    return torch.where(known >= 0.5, shares / known.clamp(min=1e-6), 0.0)


def _examples(features: Features | Sequence[Features], masks: Masks) -> tuple[list[Features], list[Tensor], int]:
    """Checked input: the images, their masks [height, width] int64, and the number of classes with the background."""
    images = list(each(features))
    single = isinstance(masks, Image.Image) or (isinstance(masks, (Tensor, np.ndarray)) and masks.ndim == 2)
    given: list[Any] = [masks] if single else list(masks)
    if len(given) != len(images) or not images:
        raise InputError(f"there are {len(images)} images and {len(given)} masks; give one mask per image")
    found = []
    for number, (one, given_mask) in enumerate(zip(images, given, strict=True)):
        mask = as_tensor(given_mask, f"mask {number}")
        size = one.placements[0].original
        if tuple(mask.shape) != size:
            raise InputError(
                f"mask {number} is {list(mask.shape)} and its image {list(size)} (height, width); "
                "give a mask of the size of the image after EXIF rotation"
            )
        if mask.is_floating_point() or int(mask.min()) < 0 or int(mask.max()) > IGNORE:
            raise InputError(
                f"mask {number} holds {mask.dtype} from {mask.min():g} to {mask.max():g}; give bool, or whole numbers: "
                "0 for the background, 1 to 254 for classes, 255 for pixels to ignore"
            )
        found.append(mask.cpu().long())
    labels = torch.cat([mask.unique() for mask in found]).unique()
    labels = labels[labels != IGNORE].tolist()
    if len(labels) < 2:
        only = labels[0] if labels else IGNORE
        if IGNORE in torch.cat([mask.unique() for mask in found]) and labels == [0]:
            raise InputError(
                f"the masks hold only 0 and {IGNORE}, and {IGNORE} means ignore; give mask > 0 if {IGNORE} marks the "
                "object"
            )
        raise InputError(f"the masks are {only} at every pixel; mark a part of an image, and leave the rest 0")
    return images, found, labels[-1] + 1
