"""ConvNeXt, as DINOv3 was distilled into it: four stages of convolutions, and no attention.

Source: ConvNeXt (arXiv 2201.03545), DINOv3 paper (arXiv 2508.10104), section 6; dinov3/models/convnext.py at 6876159.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, InputTypeError, UnsupportedError
from .layers import LayerNorm, project, with_enough_rows
from .network import BackboneOutput, LayerOutput, Network, resolve_layers

__all__ = ["ConvBlock", "ConvNeXt", "ConvNeXtConfig", "Depthwise", "Patches"]

_STEM = 4  # pixels of the side of what the first convolution makes one position of


@dataclass(frozen=True)
class ConvNeXtConfig:
    """What the weights cannot do without."""

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels of each stage
    norm_eps: float = 1e-6
    in_chans: ClassVar[int] = 3
    position_grid: ClassVar[None] = None  # as of a vision transformer without learned positions

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if len(values) != 4 or any(value < 1 for value in values):
                raise InputError(f"{name} is {values}; give four whole numbers above 0, one for each stage")

    @property
    def embed_dim(self) -> int:
        """C of the last stage."""
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Blocks of the longest stage."""
        return max(self.depths)

    @property
    def patch_size(self) -> int:
        """Pixels of the side of a position of the last stage."""
        return int(_STEM * 2 ** (len(self.widths) - 1))

    hidden_sizes = property(lambda self: list(self.widths))  # transformers' name


class Depthwise(nn.Conv2d):
    """The 7 x 7 convolution of each channel of a map [B, h, w, C], in the dtype of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 7, padding=3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2).to(self.weight.dtype)).permute(0, 2, 3, 1)


class Patches(nn.Conv2d):
    """A convolution whose stride is its side, of a map [B, h, w, C]: a linear over patches.

    As a convolution it would round differently for one image than for several.
    """

    def __init__(self, before: int, after: int, side: int) -> None:
        super().__init__(before, after, side, side)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix()
        return with_enough_rows(lambda patches: F.linear(patches, weight, self.bias), self.patches(x))

    def patches(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h / side, w / side, side * side * C], rounded down."""
        side = self.kernel_size[0]
        h, w = x.shape[1] // side, x.shape[2] // side
        x = x[:, : h * side, : w * side].to(self.weight.dtype)
        return x.unflatten(2, (w, side)).unflatten(1, (h, side)).transpose(2, 3).flatten(3)  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """The weight for rows of `patches`."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)


class ConvBlock(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.dwconv = Depthwise(width)
        self.norm = LayerNorm(width, eps)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C]
        branch = self.norm(self.dwconv(x).to(x.dtype))
        branch = project(self.pwconv2, F.gelu(project(self.pwconv1, branch)))
        return x + branch.to(x.dtype) * self.gamma.to(x.dtype)


class ConvNeXt(Network):
    """ConvNeXt of the first version; parameter names are Meta's.

    Layers are stages, each with a width and a stride of its own, and only the last one has a norm: the others are given
    raw, the mean over their positions as the class token.
    """

    config: ConvNeXtConfig
    why_not_padded = "its convolutions and the mean over all positions would see the padding"

    def __init__(self, config: ConvNeXtConfig) -> None:
        super().__init__()
        self.config = config
        first, *later = config.widths
        eps = config.norm_eps
        steps = [nn.Sequential(Patches(3, first, _STEM), LayerNorm(first, eps))]
        for before, after in zip(config.widths, later, strict=False):
            steps.append(nn.Sequential(LayerNorm(before, eps), Patches(before, after, 2)))
        self.downsample_layers = nn.ModuleList(steps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvBlock(width, eps) for _ in range(depth)))
            for depth, width in zip(config.depths, config.widths, strict=True)
        )
        self.norm = LayerNorm(config.embed_dim, eps)
        self.register_buffer("rope_periods", None)
        if not self.norm.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, layerscale: float = 1e-6) -> None:
        """Random weights as in Meta's code; every tensor is written."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvBlock):
                nn.init.constant_(module.gamma, layerscale)

    # --- the contract of a network -------------------------------------------------------------------------------

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        return self.stages

    def stride(self, layer: int = -1) -> int:
        return int(_STEM * 2 ** (layer % self.n_blocks))

    def width(self, layer: int = -1) -> int:
        return self.config.widths[layer]

    @property
    def main_weight(self) -> Tensor:
        return self.downsample_layers[0][0].weight  # type: ignore[index, no-any-return]

    def description(self) -> dict[str, Any]:
        return asdict(self.config)

    def summary(self) -> str:
        depths, widths = (" ".join(map(str, values)) for values in (self.config.depths, self.config.widths))
        return f"ConvNeXt with stages of {depths} blocks, {widths} wide, stride {self.stride()}"

    def grid_of(self, pixels: Tensor, layer: int = -1) -> tuple[int, int]:
        """(h, w) of a stage: sides are rounded down, by each stage anew.

        Raises: InputError for anything that is not a batch of images of 32 pixels a side or more.
        """
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputTypeError(f"the model takes normalised float pixels, got {found}; use extract_features()")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"the model takes pixels of shape [B, 3, height, width], got {list(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height < self.stride() or width < self.stride():
            raise InputError(
                f"input {height}x{width} is too small; a ConvNeXt takes {self.stride()} pixels a side or more"
            )
        stride = self.stride(layer)
        return height // stride, width // stride

    # --- the forward pass ----------------------------------------------------------------------------------------

    def forward(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px] float, normalised; sides of 32 pixels or more
        layers: int | Sequence[int] | None = None,
        masks: Tensor | None = None,
    ) -> BackboneOutput:
        """As in `Network`; the class token is the normed mean of the last map, and there are no registers."""
        if masks is not None:
            raise UnsupportedError("masks need a mask token, which a ConvNeXt has not; leave masks out")
        return self.output(self.run_stages(pixels), resolve_layers(layers, self.n_blocks))

    def output(self, maps: Sequence[Tensor], indices: Sequence[int]) -> BackboneOutput:
        """The tokens of the last of all maps, and as layers those of `indices`."""
        each = {i: self.tokens(maps[i], norm=i == len(maps) - 1) for i in {*indices, len(maps) - 1}}
        return BackboneOutput(*each[len(maps) - 1], tuple(each[i] for i in indices))

    def run_stages(self, pixels: Tensor) -> list[Tensor]:
        """The raw map of each stage, [B, h, w, C] with h, w and C of the stage."""
        self.grid_of(pixels)
        x = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).permute(0, 2, 3, 1)
        maps: list[Tensor] = []
        for step, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(step(x).to(x.dtype))
            maps.append(x)
        return maps

    def tokens(self, x: Tensor, norm: bool = False) -> LayerOutput:
        """A map [B, h, w, C] as a class token, which is its mean, no registers, and patches."""
        patches = x.flatten(1, 2)
        cls_token, registers = patches.mean(dim=1), patches[:, :0]
        if not norm:
            return LayerOutput(cls_token, registers, patches)
        return LayerOutput(self.norm(cls_token), registers, self.norm(patches))
