"""Maps at several strides, for detectors and other heads that expect a feature pyramid."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..model.network import as_map

if TYPE_CHECKING:
    from ..backbone import Backbone

__all__ = ["Level", "Pyramid"]


class Level(NamedTuple):
    """One map of a pyramid; the field names are those of detectron2's ShapeSpec."""

    channels: int
    stride: int  # pixels


class Pyramid(nn.Module):
    """A simple feature pyramid over a backbone: an ordered dict of maps, one per stride.

    Each map is made from the layer with the nearest stride: for a ViT the last layer, for a ConvNeXt that stage.  With
    patches of 14 pixels the backbone sees the image at 14/16 of its size, so that a patch has stride 16.  torchvision's
    detectors take a pyramid as their backbone (give them `image_mean` and `image_std` of `backbone.preprocess`);
    `output_shape` and `size_divisibility` are detectron2's.

    Args:
        backbone: the model.
        out_channels: channels of each map (default: 256).
        strides: pixels, powers of 2 (default: (4, 8, 16, 32)).
        names: keys of the maps (default: ("0", "1", "2", "3")).
        freeze: keep the backbone in eval mode and without gradients, and train only the new layers (default: True).

    Raises:
        InputError: a stride is not a power of 2, or there is not one name per stride.

    Source: ViTDet (arXiv 2203.16527), section 3: transposed convolutions and pooling of one map, then 1 x 1 and 3 x 3
    convolutions, each with a norm over channels.
    """

    def __init__(
        self,
        backbone: "Backbone",
        out_channels: int = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        names: Sequence[str] = ("0", "1", "2", "3"),
        freeze: bool = True,
    ) -> None:
        super().__init__()
        if not strides or any(s < 1 or s & (s - 1) for s in strides) or len(set(names)) != len(strides):
            raise InputError(
                f"strides are powers of 2 with one name each, got {list(strides)} and {list(names)}; give for example "
                "strides=(8, 16), names=('0', '1')"
            )
        self.backbone, self.freeze, self.out_channels = backbone, freeze, out_channels
        self.strides = dict(zip(names, strides, strict=True))
        self.stride = 1 << round(math.log2(backbone.patch_size))  # stride of the last map
        have = [1 << round(math.log2(backbone.stride(layer))) for layer in range(backbone.n_blocks)]
        self.layers = {  # of equal layers the last
            name: min(range(len(have)), key=lambda layer: (abs(math.log2(have[layer] / stride)), -layer))
            for name, stride in self.strides.items()
        }
        self.levels = nn.ModuleDict(
            {
                name: _level(backbone.width(self.layers[name]), out_channels, have[self.layers[name]], stride)
                for name, stride in self.strides.items()
            }
        )
        backbone.requires_grad_(not freeze)

    @property
    def size_divisibility(self) -> int:
        """Images whose sides are multiples of this need no padding."""
        return max(self.stride, *self.strides.values())

    def output_shape(self) -> dict[str, Level]:
        """Channels and stride of each map, by name."""
        return {name: Level(self.out_channels, stride) for name, stride in self.strides.items()}

    def forward(self, pixels: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps [B, out_channels, H_px / stride, W_px / stride] of normalised pixels [B, 3, H_px, W_px] of any size.

        Sides of maps are rounded up; the maps are cropped to the part without padding.
        """
        height, width = pixels.shape[2:]
        whole = [-(-side // self.size_divisibility) * self.size_divisibility for side in (height, width)]
        padded = F.pad(pixels, (0, whole[1] - width, 0, whole[0] - height))
        if self.stride != self.backbone.patch_size:
            size = [side // self.stride * self.backbone.patch_size for side in whole]
            padded = F.interpolate(padded, size=size, mode="bilinear", antialias=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            asked = sorted(set(self.layers.values()) - {self.backbone.n_blocks - 1})
            output = self.backbone(padded, layers=asked)
        tokens = {self.backbone.n_blocks - 1: output.patch_tokens}
        tokens |= {layer: found.patch_tokens for layer, found in zip(asked, output.layers, strict=True)}
        dense = {layer: as_map(t, self.backbone.grid_of(padded, layer)).float() for layer, t in tokens.items()}
        return OrderedDict(
            (name, self.levels[name](dense[self.layers[name]])[..., : -(-height // stride), : -(-width // stride)])
            for name, stride in self.strides.items()
        )

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; a frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and not self.freeze)
        return self


class _ChannelNorm(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, h, w]
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _level(channels: int, out_channels: int, have: int, want: int) -> nn.Sequential:
    """The layers that turn a map with stride `have` into one with stride `want`."""
    layers: list[nn.Module] = []
    while have > want:  # doubles the size and halves the channels
        layers += [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)]
        have, channels = have // 2, channels // 2
        if have > want:
            layers += [_ChannelNorm(channels), nn.GELU()]
    if have < want:
        layers += [nn.MaxPool2d(want // have)]
    layers += [nn.Conv2d(channels, out_channels, 1, bias=False), _ChannelNorm(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), _ChannelNorm(out_channels)]
    return nn.Sequential(*layers)
