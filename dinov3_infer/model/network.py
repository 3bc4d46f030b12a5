"""The contract of a network: what features, embedding, saving and export ask an architecture for.

Nothing outside `model` needs to know which network it has; what only a vision transformer can do (facets, attention
maps, packed crops) is asked of a `VisionTransformer` by name, and refused in one sentence for others.
"""

from collections.abc import Callable, Sequence
from operator import index
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, InputTypeError, LayerError, UnsupportedError
from .tracing import one_node

__all__ = [
    "BackboneOutput",
    "LayerOutput",
    "Network",
    "Outputs",
    "Scale",
    "as_map",
    "normalised",
    "resolve_layers",
    "shapes",
    "whole_patches",
    "without_layers",
]

Scale: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std of red, green, blue


class LayerOutput(NamedTuple):
    """Tokens of one layer after the final norm, where that layer has one; C, P, h and w are those of that layer."""

    cls_token: Tensor  # [B, C]
    register_tokens: Tensor  # [B, R, C]
    patch_tokens: Tensor  # [B, P, C]

    def __repr__(self) -> str:
        return f"LayerOutput({shapes(self, self._fields)})"


class BackboneOutput(NamedTuple):
    """Tokens after the last layer and the final norm, and those of the layers asked for.

    Example:
        >>> out = bb(bb.preprocess(["cat.jpg"]))
        >>> out.cls_token, out.last_hidden_state  # [1, C], [1, N, C]
    """

    cls_token: Tensor  # [B, C]
    register_tokens: Tensor  # [B, R, C]
    patch_tokens: Tensor  # [B, P, C]
    layers: tuple[LayerOutput, ...] = ()

    @property
    def last_hidden_state(self) -> Tensor:
        """transformers' name for all tokens: class token, registers, patches, [B, N, C]."""
        return torch.cat((self.cls_token[:, None], self.register_tokens, self.patch_tokens), dim=1)

    @property
    def pooler_output(self) -> Tensor:
        """transformers' name for the class token, [B, C]."""
        return self.cls_token

    def __repr__(self) -> str:
        return f"BackboneOutput({shapes(self, self._fields[:3])}, {len(self.layers)} layers)"


def shapes(holder: object, names: Sequence[str]) -> str:
    """The shapes of tensors, in one line: a notebook shows it instead of the numbers."""
    return ", ".join(f"{name} {list(getattr(holder, name).shape)}" for name in names)


class Outputs(list[BackboneOutput]):
    """One for each tensor of a pass, with the sum of all tokens, which is not finite where one of them is not."""

    def __init__(self, outputs: Sequence[BackboneOutput], total: Tensor | None = None) -> None:
        super().__init__(outputs)
        self.total = total  # [] float32; None where nobody has computed it


class Network(nn.Module):
    """Normalised pixels in, named tokens out."""

    config: Any  # a frozen dataclass: all that shapes and numbers depend on beside the weights
    blocks: nn.ModuleList  # what is repeated; `layers` counts these
    rope_periods: Tensor | None  # [D/4] float32, of rotary positions; None without

    def forward(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px] float, normalised
        layers: int | Sequence[int] | None = None,
        masks: Tensor | None = None,  # [B, P] bool: these patches become the mask token
    ) -> BackboneOutput:
        """Tokens after the final norm, float32 at least.

        `layers` asks for intermediate layers too: an int for the last n, a list for these, in that order.

        Raises: InputError for a size or a mask that the network does not take, LayerError for a missing layer.
        """
        raise NotImplementedError

    def forward_sizes(
        self,
        batches: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float, normalised: one tensor per size
        layers: int | Sequence[int] | None = None,
    ) -> list[BackboneOutput]:
        """What `forward` gives for each tensor; a network that can takes them in one pass."""
        return [self(pixels, layers=layers) for pixels in batches]

    def grid_of(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px]
        layer: int = -1,
    ) -> tuple[int, int]:
        """(h, w) in patches of a layer.  Raises InputError for a tensor that the network does not take."""
        raise NotImplementedError

    def stride(self, layer: int = -1) -> int:
        """Pixels of the side of a patch of a layer."""
        raise NotImplementedError

    def width(self, layer: int = -1) -> int:
        """C of a layer."""
        raise NotImplementedError

    @property
    def main_weight(self) -> Tensor:
        """A weight that matrix products use: its device and dtype are those of the network."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """All that features depend on beside the weights, as JSON takes it."""
        raise NotImplementedError

    def init_weights(self, layerscale: float = 1e-5) -> None:
        """Random weights as in the papers' training code; every tensor is written."""
        raise NotImplementedError

    def set_attention(self, implementation: str | Callable[..., Tensor]) -> None:
        """Which attention runs; a network without any takes "auto" alone.  Raises: InputError, UnsupportedError."""
        if implementation != "auto":
            raise UnsupportedError(
                f"attn_implementation={implementation!r} needs attention, which this network has not"
            )

    def why_not_triton(self) -> str | None:
        """Why attention cannot run as the Triton kernel here, or None if it can."""
        return "this network has no attention"

    def summary(self) -> str:
        """The architecture in a few words."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.main_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.main_weight.dtype

    @property
    def embed_dim(self) -> int:
        return self.width()

    num_features = embed_dim

    @property
    def patch_size(self) -> int:
        return self.stride()

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    why_not_padded: str | None = None  # why an image cannot be filled up with a mean colour
    num_register_tokens = 0  # R
    num_prefix_tokens = 1  # class token and registers, which stand before the patches


def normalised(
    pixels: Tensor,  # [B, 3, H_px, W_px] uint8, or float and normalised already
    scale: Scale,
) -> Tensor:
    """What a network takes, [B, 3, H_px, W_px] float, on the device of the pixels."""
    if pixels.dtype != torch.uint8:
        return pixels
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1).to(pixels.device) for values in scale
    )
    return (pixels / 255.0).to(torch.float32).sub_(mean).div_(std)


def as_map(
    patch_tokens: Tensor,  # [B, P, C]
    grid: tuple[int, int],  # (h, w) in patches
) -> Tensor:
    """[B, C, h, w], a view."""
    return patch_tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def resolve_layers(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    """Block indices from 0: an int asks for the last n, a sequence for these, negative ones from the end."""
    if layers is None:
        return []
    try:
        single = isinstance(layers, int) or getattr(layers, "ndim", 1) == 0  # numpy's and torch's numbers too
        last = index(layers) if single else None  # type: ignore[arg-type]
        asked = [] if last is not None else [index(layer) for layer in layers]  # type: ignore[union-attr]
    except TypeError:
        raise InputTypeError(f"layers is a number of blocks or a list of block numbers, got {layers!r}") from None
    if last is not None:
        if not 1 <= last <= depth:
            raise LayerError(
                f"layers={last} asks for the last {last} blocks of {depth}; give 1 to {depth}, or a list of blocks"
            )
        return list(range(depth - last, depth))
    for layer in asked:
        if not -depth <= layer < depth:
            raise LayerError(f"layer {layer} does not exist; this model has {depth} (0..{depth - 1} or -{depth}..-1)")
    return [layer % depth for layer in asked]


@one_node
def whole_patches(pixels: Tensor, size: int, channels: int = 3) -> tuple[int, int]:
    """See `grid_of`; `size`: pixels of the side of a patch."""
    if not isinstance(pixels, Tensor):
        raise InputTypeError(
            f"the model takes a tensor, got {type(pixels).__name__}; use extract_features() for pictures"
        )
    if not pixels.is_floating_point():
        raise InputTypeError(
            f"the model takes normalised float pixels, got {pixels.dtype}; use extract_features() or preprocess()"
        )
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        raise InputError(f"the model takes pixels of shape [B, {channels}, height, width], got {list(pixels.shape)}")
    height, width = pixels.shape[2:]
    if height % size or width % size or not height or not width:
        nearest = [max(1, round(side / size)) * size for side in (height, width)]
        raise InputError(
            f"input {height}x{width} is not a multiple of the patch size {size}; the nearest is "
            f"{nearest[0]}x{nearest[1]}, and extract_features(fit='native') goes there by itself"
        )
    return height // size, width // size


@one_node
def without_layers(pixels: Tensor, layers: Any) -> Tensor:
    """For a graph of torch.fx, whose layers are chosen when it is made."""
    if layers is not None:
        raise InputError(f"this graph was traced without layers, and layers={layers!r} was given; trace it with them")
    return pixels
