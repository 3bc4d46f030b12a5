"""Semantic segmentation with DINOv2's linear heads, in a sliding window.

Source: the segmenters of dinov2 at the commit that `catalogue` names; windows as mmsegmentation 0.x has them.
"""

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..errors import InputError
from ..images.decode import load_image
from ..images.opening import each_image
from .catalogue import HeadInfo
from .head import Released, to_whole_patches

__all__ = ["SegmentMap", "Segments", "classes_of"]

Colour: TypeAlias = tuple[int, int, int]  # red, green, blue in 0 to 255

WINDOW, STRIDE = 512, 341  # pixels
LONGEST = 2048  # pixels of the long side, whatever the short one
_LABELS = Path(__file__).parent.parent / "data" / "labels"
_AT_A_TIME = 2**26  # numbers that are enlarged to the size of an image in one go


class SegmentMap(NamedTuple):
    """One image."""

    labels: Tensor  # [H_px, W_px] int64 on the CPU: the class of every pixel
    names: tuple[str, ...]  # of the classes
    colours: tuple[Colour, ...]  # of the classes, as their data set draws them


class Segments(Released):
    """Logits of classes for every patch: batch norm and one product, on the last block or on the last four.

    Blocks are taken after the final norm, without class tokens.
    """

    rules = (
        (r"(?:decode_head\.)?((?:bn|conv_seg)\..*)", r"\1"),
        (r"backbone\..*", ""),
    )

    def __init__(self, info: HeadInfo, backbone: Backbone) -> None:
        super().__init__(info, backbone)
        self.names, self.colours = classes_of(info.options["classes"])
        self.layers: int = info.options["layers"]
        width = self.layers * backbone.embed_dim
        with backbone.device:
            self.bn = nn.BatchNorm2d(width)
            self.conv_seg = nn.Conv2d(width, len(self.names), 1)
        self.eval()

    def patch_logits(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H_px, W_px] of whole patches -> logits [B, K, h, w]."""
        maps = self.backbone.get_intermediate_layers(pixels, self.layers, reshape=True, norm=True)  # type: ignore[operator]
        found: Tensor = self.conv_seg(self.bn(torch.cat(maps, dim=1).to(self.conv_seg.weight.dtype)))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H_px, W_px] -> logits [B, K, H_px, W_px] as the owner's code gives them.

        Windows of 512 pixels start every 341, the last ends at the border, and where they overlap their mean counts.
        Each is filled up to whole patches, and its logits are stretched over the window, padding included.
        """
        return self._in_windows(pixels, stretched=True)

    @torch.no_grad()
    def predict(self, images: Images, size: int = WINDOW) -> list[SegmentMap]:
        """The class of every pixel of each image, at its own size.

        `images`: as in `extract_features`, each of any size.
        `size`: pixels of the short side that the model sees; the long side has 2,048 at most.

        The windows are those of `forward`, but the logits of the padding are cut off, so that classes lie on the pixels
        that they are of.  One scale is used for every head: the list of scales of the "ms" results is not published
        with them.

        Raises: as `extract_features`; InputError for a size that is none.
        """
        if not isinstance(size, int) or not self.backbone.patch_size <= size <= LONGEST:
            raise InputError(
                f"size is the short side in pixels, from {self.backbone.patch_size} to {LONGEST}, got {size!r}"
            )
        results = []
        for image in each_image(images):
            picture = load_image(image, levels=self.preprocess.levels)
            sides = picture.shape[1:]
            factor = min(size / min(sides), LONGEST / max(sides))
            batch = self.pixels([picture], max(1, round(max(sides) * factor)))
            logits = self._in_windows(batch.pixels, stretched=False)[0]
            labels = _largest(logits, (sides[0], sides[1])).cpu()
            results.append(SegmentMap(labels, self.names, self.colours))
        return results

    def _in_windows(self, pixels: Tensor, stretched: bool) -> Tensor:
        height, width = pixels.shape[2:]
        total = torch.zeros(len(pixels), len(self.names), height, width).to(self.conv_seg.weight)
        count = total.new_zeros(height, width)
        for top in _starts(height):
            for left in _starts(width):
                here = slice(top, top + WINDOW), slice(left, left + WINDOW)
                total[:, :, *here] += self._window(pixels[:, :, *here], stretched)
                count[here] += 1
        return total.div_(count)

    def _window(self, pixels: Tensor, stretched: bool) -> Tensor:
        """[B, 3, H_px, W_px] -> [B, K, H_px, W_px]."""
        height, width = pixels.shape[2:]
        whole, (left, _, top, _) = to_whole_patches(pixels, self.backbone.patch_size)
        logits = self.patch_logits(whole)
        if stretched:
            return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        logits = F.interpolate(logits, size=whole.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, top : top + height, left : left + width]


def _starts(length: int) -> list[int]:
    """Where windows start along a side, in pixels."""
    last = max(length - WINDOW, 0)
    return [min(i * STRIDE, last) for i in range(math.ceil(last / STRIDE) + 1)]


def _largest(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits [K, H, W] -> the class of every pixel at another size, [H_px, W_px] int64; a few classes at a time."""
    best = torch.full(size, -torch.inf).to(logits)
    labels = torch.zeros(size, dtype=torch.int64, device=logits.device)
    step = max(1, _AT_A_TIME // (size[0] * size[1]))
    for start in range(0, len(logits), step):
        some = F.interpolate(logits[None, start : start + step], size=size, mode="bilinear", align_corners=False)
        values, index = some[0].max(dim=0)
        better = values > best
        best, labels = torch.where(better, values, best), torch.where(better, index + start, labels)
    return labels


@cache
def classes_of(dataset: str) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours of the classes of "ade20k" or "voc2012", in order."""
    lines = (_LABELS / f"{dataset}.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split(" ", 1) for line in lines]
    colours = (bytes.fromhex(colour) for colour, _ in rows)
    return tuple(name for _, name in rows), tuple((r, g, b) for r, g, b in colours)
