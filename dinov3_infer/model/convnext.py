"""ConvNeXt as distilled from DINOv3: four stages of convolutions, without attention.

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

_STEM = 4  # stride of the first convolution in pixels


@dataclass(frozen=True)
class ConvNeXtConfig:
    """The architecture of a ConvNeXt.

    Raises: InputError for anything but four numbers above 0 in `depths` and `widths`.
    """

    depths: tuple[int, ...]  # blocks of each stage
    widths: tuple[int, ...]  # channels of each stage
    norm_eps: float = 1e-6
    in_chans: ClassVar[int] = 3
    position_grid: ClassVar[None] = None  # as in a vision transformer without learned positions

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
        """Blocks in the longest stage."""
        return max(self.depths)

    @property
    def patch_size(self) -> int:
        """Stride of the last stage in pixels."""
        return int(_STEM * 2 ** (len(self.widths) - 1))

    hidden_sizes = property(lambda self: list(self.widths))  # transformers' name


class Depthwise(nn.Conv2d):
    """A 7 x 7 convolution of each channel of a map [B, h, w, C], in the dtype of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 7, padding=3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C] in the dtype of the weights."""
        return super().forward(x.permute(0, 3, 1, 2).to(self.weight.dtype)).permute(0, 2, 3, 1)


class Patches(nn.Conv2d):
    """A convolution of a map [B, h, w, C] whose stride is its kernel size, computed as a linear layer over patches.

    A convolution kernel would round differently for one image than for several.
    """

    def __init__(self, before: int, after: int, side: int) -> None:
        super().__init__(before, after, side, side)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h / side, w / side, C'], rounded down."""
        weight = self.matrix()
        return with_enough_rows(lambda patches: F.linear(patches, weight, self.bias), self.patches(x))

    def patches(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h / side, w / side, side * side * C], rounded down."""
        side = self.kernel_size[0]
        h, w = x.shape[1] // side, x.shape[2] // side
        x = x[:, : h * side, : w * side].to(self.weight.dtype)
        return x.unflatten(2, (w, side)).unflatten(1, (h, side)).transpose(2, 3).flatten(3)  # type: ignore[no-any-return]

    def matrix(self) -> Tensor:
        """The weight for rows of `patches`, [C', side * side * C]."""
        return self.weight.permute(0, 2, 3, 1).flatten(1)


class ConvBlock(nn.Module):
    """Depthwise convolution, layer norm and MLP, with LayerScale and a residual connection."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.dwconv = Depthwise(width)
        self.norm = LayerNorm(width, eps)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, C] -> [B, h, w, C]."""
        branch = self.norm(self.dwconv(x).to(x.dtype))
        branch = project(self.pwconv2, F.gelu(project(self.pwconv1, branch)))
        return x + branch.to(x.dtype) * self.gamma.to(x.dtype)


class ConvNeXt(Network):
    """ConvNeXt V1 with Meta's parameter names.

    Layers are stages, each with its own width and stride.  Only the last stage has a norm; the other stages give their
    raw map, with its mean as the class token.
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
        """Initialise every tensor at random, as in Meta's code."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()
            elif isinstance(module, ConvBlock):
                nn.init.constant_(module.gamma, layerscale)

    # The interface of a network

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The stages."""
        return self.stages

    def stride(self, layer: int = -1) -> int:
        """Stride of a stage in pixels."""
        return int(_STEM * 2 ** (layer % self.n_blocks))

    def width(self, layer: int = -1) -> int:
        """C of a stage."""
        return self.config.widths[layer]

    @property
    def main_weight(self) -> Tensor:
        """The weight of the first convolution, [C, 3, 4, 4]."""
        return self.downsample_layers[0][0].weight  # type: ignore[index, no-any-return]

    def description(self) -> dict[str, Any]:
        """The fields of the config."""
        return asdict(self.config)

    def summary(self) -> str:
        """The architecture in one line."""
        depths, widths = (" ".join(map(str, values)) for values in (self.config.depths, self.config.widths))
        return f"ConvNeXt with stages of {depths} blocks, {widths} wide, stride {self.stride()}"

    def grid_of(self, pixels: Tensor, layer: int = -1) -> tuple[int, int]:
        """(h, w) of a stage for pixels [B, 3, H_px, W_px]; each stage rounds its sides down.

        Raises:
            InputTypeError: `pixels` is no float tensor.
            InputError: The shape is not [B, 3, H_px, W_px], or a side is below 32 pixels.
        """
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
            found = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputTypeError(f"the model takes normalised float pixels, got {found}; use extract_features()")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"the model takes pixels of shape [B, 3, height, width], got {list(pixels.shape)}")
        height, width = pixels.shape[2:]
        if height < self.stride() or width < self.stride():
            raise InputError(f"input {height}x{width} is too small; give at least {self.stride()} pixels a side")
        stride = self.stride(layer)
        return height // stride, width // stride

    # The forward pass

    def forward(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px] float, normalised; sides of 32 pixels or more
        layers: int | Sequence[int] | None = None,
        masks: Tensor | None = None,
    ) -> BackboneOutput:
        """Compute tokens, see `Network.forward`.

        The class token is the norm of the mean over the last map, and there are no registers.

        Raises: UnsupportedError for masks; InputError, InputTypeError, LayerError as in `Network.forward`.
        """
        if masks is not None:
            raise UnsupportedError("masks need a mask token, which a ConvNeXt does not have; leave masks out")
        return self.output(self.run_stages(pixels), resolve_layers(layers, self.n_blocks))

    def output(self, maps: Sequence[Tensor], indices: Sequence[int]) -> BackboneOutput:
        """The tokens of the last of all maps, each [B, h, w, C], and of the stages `indices` as layers."""
        each = {i: self.tokens(maps[i], norm=i == len(maps) - 1) for i in {*indices, len(maps) - 1}}
        return BackboneOutput(*each[len(maps) - 1], tuple(each[i] for i in indices))

    def run_stages(self, pixels: Tensor) -> list[Tensor]:
        """[B, 3, H_px, W_px] -> the raw map of each stage, [B, h, w, C] with h, w and C of the stage."""
        self.grid_of(pixels)
        x = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).permute(0, 2, 3, 1)
        maps: list[Tensor] = []
        for step, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(step(x).to(x.dtype))
            maps.append(x)
        return maps

    def tokens(self, x: Tensor, norm: bool = False) -> LayerOutput:
        """A map [B, h, w, C] -> class token [B, C] (its mean), no registers [B, 0, C], and patches [B, h*w, C]."""
        patches = x.flatten(1, 2)
        cls_token, registers = patches.mean(dim=1), patches[:, :0]
        if not norm:
            return LayerOutput(cls_token, registers, patches)
        return LayerOutput(self.norm(cls_token), registers, self.norm(patches))
