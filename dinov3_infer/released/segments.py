"""Semantic segmentation with DINOv2's linear heads, in a sliding window.

Source: the segmenters of dinov2 at the commit that `catalogue` names; windows as mmsegmentation 0.x has them.
"""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..images.decode import load_image
from ..images.opening import each_image
from .catalogue import HeadInfo
from .head import Released, to_whole_patches
from .windows import LONGEST, Colour, SegmentMap, check_short_side, largest, over_windows

__all__ = ["Segments", "classes_of"]

WINDOW, STRIDE = 512, 341  # pixels
_LABELS = Path(__file__).parent.parent / "data" / "labels"


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

        The windows are those of `forward`, but the logits of the padding are cut off, so that classes lie on their
        pixels.  "ms" heads see one scale, too: their owner averages several, by settings that are not here.

        Raises: as `extract_features`; InputError for a size that is none.
        """
        check_short_side(size, self.backbone.patch_size)
        results = []
        for image in each_image(images):
            loaded = load_image(image, levels=self.preprocess.levels)
            sides = loaded.shape[1:]
            factor = min(size / min(sides), LONGEST / max(sides))
            batch = self.pixels([loaded], max(1, round(max(sides) * factor)))
            logits = self._in_windows(batch.pixels, stretched=False)[0]
            labels = largest(logits, (sides[0], sides[1])).cpu()
            results.append(SegmentMap(labels, self.names, self.colours))
        return results

    def _in_windows(self, pixels: Tensor, stretched: bool) -> Tensor:
        return over_windows(pixels, WINDOW, STRIDE, lambda window: self._window(window, stretched))

    def _window(self, pixels: Tensor, stretched: bool) -> Tensor:
        """[B, 3, H_px, W_px] -> [B, K, H_px, W_px]."""
        height, width = pixels.shape[2:]
        whole, (left, _, top, _) = to_whole_patches(pixels, self.backbone.patch_size)
        logits = self.patch_logits(whole)
        if stretched:
            return F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        logits = F.interpolate(logits, size=whole.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, top : top + height, left : left + width]


@cache
def classes_of(dataset: str) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Names and colours of the classes of "ade20k" or "voc2012", in order."""
    lines = (_LABELS / f"{dataset}.txt").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split(" ", 1) for line in lines]
    colours = (bytes.fromhex(colour) for colour, _ in rows)
    return tuple(name for _, name in rows), tuple((r, g, b) for r, g, b in colours)
