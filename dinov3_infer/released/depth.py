"""Depth from a backbone: the DPT decoder of three releases, and the linear heads of DINOv2.

Source: DPT (arXiv 2103.13413); the depthers of dinov2 and dinov3 at the commits that `catalogue` names.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Images
from ..images.opening import each_image
from .catalogue import HeadInfo
from .head import Released, to_whole_patches

__all__ = ["Depth", "DepthMap", "DptDecoder", "LinearDecoder", "bins_of"]


class DepthMap(NamedTuple):
    """One image."""

    depth: Tensor  # [H_px, W_px] float32 on the CPU, in metres
    info: HeadInfo


# --- the decoders --------------------------------------------------------------------------------------------------


def _named(**parts: nn.Module) -> nn.Module:
    """A module that does nothing but give its parts the names that they have in files."""
    return nn.ModuleDict(parts)


class _Unit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (_named(conv=nn.Conv2d(width, width, 3, padding=1, bias=bias)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.conv2.conv(self.conv1.conv(x.relu()).relu())  # type: ignore[operator]
        return found


class _Fusion(nn.Module):
    def __init__(self, width: int, bias: bool, first: bool) -> None:
        super().__init__()
        self.res_conv_unit1 = None if first else _Unit(width, bias)
        self.res_conv_unit2 = _Unit(width, bias)
        self.project = _named(conv=nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.res_conv_unit1 is not None and other is not None:
            if other.shape != x.shape:
                other = F.interpolate(other, size=x.shape[2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(other)
        x = _doubled(self.res_conv_unit2(x))
        return self.project.conv(x)  # type: ignore[operator, no-any-return]


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class DptDecoder(nn.Module):
    """Four maps and class tokens of a backbone -> one map, 32 times as fine as the grid rounded up to even.

    Parameter names are Meta's.
    """

    def __init__(
        self,
        width: int,  # C
        channels: Sequence[int],  # of the four maps
        inner: int,  # of all that comes after
        hidden: int,  # of the last convolutions
        outputs: int,
        *,
        readout: bool,  # whether the class token is joined to every patch
        norm: bool,  # batch norm of the maps
        unit_bias: bool,
        project: bool,  # a convolution before the last ones
    ) -> None:
        super().__init__()
        resize = [
            nn.ConvTranspose2d(channels[0], channels[0], 4, 4),
            nn.ConvTranspose2d(channels[1], channels[1], 2, 2),
            nn.Identity(),
            nn.Conv2d(channels[3], channels[3], 3, 2, 1),
        ]
        self.reassemble_blocks = nn.ModuleDict(
            {
                "projects": nn.ModuleList(_named(conv=nn.Conv2d(width, c, 1)) for c in channels),
                "resize_layers": nn.ModuleList(resize),
            }
        )
        self.readout, self.norm = readout, norm
        if readout:
            made = (nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in channels)
            self.reassemble_blocks["readout_projects"] = nn.ModuleList(made)
        if norm:
            self.reassemble_blocks["batchnorm_layers"] = nn.ModuleList(nn.BatchNorm2d(width) for _ in channels)
        self.convs = nn.ModuleList(_named(conv=nn.Conv2d(c, inner, 3, padding=1, bias=False)) for c in channels)
        self.fusion_blocks = nn.ModuleList(_Fusion(inner, unit_bias, i == 0) for i in range(4))
        self.project = _named(conv=nn.Conv2d(inner, inner, 3, padding=1)) if project else None
        last = [nn.Conv2d(inner, inner // 2, 3, padding=1), nn.Identity(), nn.Conv2d(inner // 2, hidden, 3, padding=1)]
        self.conv_depth = _named(head=nn.Sequential(*last, nn.ReLU(), nn.Conv2d(hidden, outputs, 1)))

    def forward(self, maps: Sequence[Tensor], cls_tokens: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, h, w] and class tokens [B, C] -> [B, outputs, 32 ceil(h / 2), 32 ceil(w / 2)]."""
        parts: Any = self.reassemble_blocks
        levels = []
        for i, (x, cls_token) in enumerate(zip(maps, cls_tokens, strict=True)):
            if self.readout:
                joined = torch.cat((x, cls_token[..., None, None].expand_as(x)), dim=1).permute(0, 2, 3, 1)
                x = parts["readout_projects"][i](joined).permute(0, 3, 1, 2)
            if self.norm:
                x = parts["batchnorm_layers"][i](x)
            x = parts["resize_layers"][i](parts["projects"][i].conv(x))
            levels.append(self.convs[i].conv(x))  # type: ignore[operator]
        x = self.fusion_blocks[0](levels[3])
        for fusion, level in zip(self.fusion_blocks[1:], levels[2::-1], strict=True):
            x = fusion(x, level)
        if self.project is not None:
            x = self.project.conv(x).relu()  # type: ignore[operator]
        head: Any = self.conv_depth.head
        return head[4](head[2](_doubled(head[0](x))).relu())  # type: ignore[no-any-return]


class LinearDecoder(nn.Module):
    """Patches beside their image's class token, four times as fine, and one product."""

    def __init__(self, width: int, layers: int, outputs: int) -> None:
        super().__init__()
        self.conv_depth = nn.Conv2d(2 * width * layers, outputs, 1)

    def forward(self, maps: Sequence[Tensor], cls_tokens: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, h, w] and class tokens [B, C] -> [B, outputs, 4 h, 4 w]."""
        parts = []
        for x, cls_token in zip(maps, cls_tokens, strict=True):
            joined = torch.cat((x, cls_token[..., None, None].expand_as(x)), dim=1)
            parts.append(F.interpolate(joined, scale_factor=4, mode="bilinear", align_corners=False))
        return self.conv_depth(torch.cat(parts, dim=1))  # type: ignore[no-any-return]


# --- from outputs to metres ----------------------------------------------------------------------------------------


def bins_of(kind: str, count: int, least: float, most: float) -> Tensor:
    """The depths that bins stand for, [count] float32: "linear", or "mixlog", which goes from logarithmic to linear."""
    line = torch.linspace(least, most, count)
    if kind == "linear":
        return line
    most = most / 8  # and all of it times 8 in the end, as the owner has it
    line, share = torch.linspace(least, most, count), torch.linspace(1, 0, count)
    curve = torch.linspace(torch.tensor(least).log().item(), torch.tensor(most).log().item(), count).exp()
    return 8 * (share * curve + (1 - share) * line)


def _metres(logits: Tensor, bins: Tensor | None, floor: float) -> Tensor:
    """[B, outputs, H, W] -> [B, 1, H, W]: of one output itself, of bins their mean by weight."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bins is None:
        return logits.relu() + floor
    weights = logits.relu() + floor
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * bins.to(weights)[:, None, None]).sum(dim=1, keepdim=True)


# --- on a backbone -------------------------------------------------------------------------------------------------

_HF = r"(?:neck|head)\."  # transformers keeps all of CHMv2's under "head", and most of DPT's under "neck"
_FUSION = rf"{_HF}fusion_(?:stage\.layers|layers)\.(\d)\."


class Depth(Released):
    """Depth in metres from four or fewer blocks of a backbone; canopy height from satellite images is depth too."""

    rules = (
        (r"(?:decode_head\.)?((?:reassemble_blocks|convs|fusion_blocks|project|conv_depth)\..*)", r"\1"),
        (rf"{_FUSION}projection\.(.*)", r"fusion_blocks.\1.project.conv.\2"),
        (rf"{_HF}fusion_(?:stage\.layers|layers)\.0\.residual_layer1\..*", ""),  # transformers never calls these
        (rf"{_FUSION}residual_layer(\d)\.convolution(\d)\.(.*)", r"fusion_blocks.\1.res_conv_unit\2.conv\3.conv.\4"),
        (rf"{_HF}reassemble_stage\.layers\.(\d)\.projection\.(.*)", r"reassemble_blocks.projects.\1.conv.\2"),
        (rf"{_HF}reassemble_stage\.layers\.(\d)\.resize\.(.*)", r"reassemble_blocks.resize_layers.\1.\2"),
        (rf"{_HF}reassemble_stage\.readout_projects\.(.*)", r"reassemble_blocks.readout_projects.\1"),
        (rf"{_HF}convs\.(\d)\.(weight)", r"convs.\1.conv.\2"),
        (r"head\.projection\.(.*)", r"project.conv.\1"),
        (r"head\.(?:conv_depth\.)?head\.(\d.*)", r"conv_depth.head.\1"),
        (r"backbone\..*", ""),
    )

    def __init__(self, info: HeadInfo, backbone: Backbone) -> None:
        super().__init__(info, backbone)
        options: dict[str, Any] = info.options
        self.blocks, self.normed = tuple(options["blocks"]), options["normed"]
        self.least, self.most = options["range"]
        width, outputs = backbone.embed_dim, options.get("outputs", 1)
        with backbone.device:
            if (dpt := options.get("dpt")) is not None:
                self.decoder: nn.Module = DptDecoder(width, outputs=outputs, **dpt)
            else:
                self.decoder = LinearDecoder(width, len(self.blocks), outputs)
        self.eval()

    def head_state(self) -> dict[str, Tensor]:
        return self.decoder.state_dict()

    def core(self, pixels: Tensor, most: float | None = None) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Normalised pixels [B, 3, H_px, W_px] -> depth [B, 1, H, W] with the padding, and (left, right, top, bottom).

        Sides are filled up with zeros to whole patches, see `to_whole_patches`.
        """
        whole, padding = to_whole_patches(pixels, self.backbone.patch_size)
        vit: Any = self.backbone
        found = vit.get_intermediate_layers(whole, self.blocks, reshape=True, return_class_token=True, norm=self.normed)
        dtype = next(self.decoder.parameters()).dtype
        logits = self.decoder([f[0].to(dtype) for f in found], [f[1].to(dtype) for f in found])
        most = self.most if most is None else most
        kind = self.info.options.get("bins")
        bins = None if kind is None else bins_of(kind, logits.shape[1], self.least, most)
        return _metres(logits, bins, self.info.options["floor"]), padding

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H_px, W_px] -> depth as the owner's code gives it, [B, 1, H, W].

        DINOv2's is stretched to the size of the input, with the padding in it; the others have the decoder's own size.
        """
        most = self.info.options.get("owner_most", self.most)
        depth, _ = self.core(pixels, most)
        if not self.info.options.get("stretched"):
            return depth
        return F.interpolate(depth.clamp(self.least, most), size=pixels.shape[2:], mode="bilinear", align_corners=False)

    @torch.no_grad()
    def predict(self, images: Images, size: int | tuple[int, int] | None = None) -> list[DepthMap]:
        """Metres for every pixel of each image, at its own size.

        `images`: as in `extract_features`, each of any size.
        `size`: pixels of the long side that the model sees, or (height, width) where the head was made for one shape;
        None for what the owner does.

        Raises: as `extract_features`.
        """
        results = []
        for image in each_image(images):
            batch = self.pixels([image], size)
            depth, (left, right, top, bottom) = self.core(batch.pixels)
            height, width = batch.pixels.shape[2:]
            whole = (height + top + bottom, width + left + right)
            depth = F.interpolate(depth, size=whole, mode="bilinear", align_corners=False)
            depth = depth[:, :, top : top + height, left : left + width].clamp(self.least, self.most)
            original = batch.placements[0].original
            if original != (height, width):
                depth = F.interpolate(depth, size=original, mode="bilinear", align_corners=False)
            results.append(DepthMap(depth[0, 0].float().cpu(), self.info))
        return results
