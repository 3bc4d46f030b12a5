"""The interface of a network for features, embedding, saving and export.

Code outside `model` does not depend on the architecture.  Features of vision transformers alone (facets, attention
maps, packed crops) require a `VisionTransformer`, and raise an error for others.
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
    "all_tokens",
    "as_map",
    "normalised",
    "resolve_layers",
    "shapes",
    "whole_patches",
    "without_layers",
]

Scale: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]  # mean, std of red, green, blue


class LayerOutput(NamedTuple):
    """Tokens of one layer, after the final norm if that layer has one; C, P, h and w are those of the layer."""

    cls_token: Tensor  # [B, C]
    register_tokens: Tensor  # [B, R, C]
    patch_tokens: Tensor  # [B, P, C]

    def __repr__(self) -> str:
        return f"LayerOutput({shapes(self, self._fields)})"


class BackboneOutput(NamedTuple):
    """Tokens after the last layer and the final norm, and those of the requested layers.

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
        return all_tokens(self.cls_token, self.register_tokens, self.patch_tokens)

    @property
    def pooler_output(self) -> Tensor:
        """transformers' name for the class token, [B, C]."""
        return self.cls_token

    def __repr__(self) -> str:
        return f"BackboneOutput({shapes(self, self._fields[:3])}, {len(self.layers)} layers)"


def all_tokens(cls_token: Tensor, register_tokens: Tensor, patch_tokens: Tensor) -> Tensor:
    """[B, C], [B, R, C] and [B, P, C] in the order of the network, [B, N, C]."""
    return torch.cat((cls_token[:, None], register_tokens, patch_tokens), dim=1)


def shapes(holder: object, names: Sequence[str]) -> str:
    """The shapes of the named tensors in one line; notebooks show it instead of the values."""
    return ", ".join(f"{name} {list(getattr(holder, name).shape)}" for name in names)


class Outputs(list[BackboneOutput]):
    """One output per tensor of a pass, and the sum of all tokens, which is not finite if any token is not."""

    def __init__(self, outputs: Sequence[BackboneOutput], total: Tensor | None = None) -> None:
        super().__init__(outputs)
        self.total = total  # [] float32; None if not computed


class Network(nn.Module):
    """Normalised pixels in, named tokens out."""

    config: Any  # a frozen dataclass; determines shapes and values together with the weights
    blocks: nn.ModuleList  # the layers that `layers` numbers
    rope_periods: Tensor | None  # [D/4] float32; None without RoPE

    def forward(
        self,
        pixels: Tensor,
        layers: int | Sequence[int] | None = None,
        masks: Tensor | None = None,
    ) -> BackboneOutput:
        """Compute tokens after the final norm, in float32 at least.

        Args:
            pixels: [B, 3, H_px, W_px] float, normalised.
            layers: Intermediate layers to return too: an int for the last n, or a list of layers, in its order.
            masks: [B, P] bool; True replaces a patch by the mask token.

        Returns: cls_token [B, C], register_tokens [B, R, C], patch_tokens [B, P, C], and a tuple of layers.

        Raises:
            InputError: The size or a mask does not fit.
            InputTypeError: `pixels` is no float tensor.
            LayerError: A layer does not exist.

        Example:
            >>> model(model.preprocess("photo.jpg")[None], layers=[-1]).patch_tokens  # [1, P, C]
        """
        raise NotImplementedError

    def forward_sizes(
        self,
        batches: Sequence[Tensor],  # [B_i, 3, H_i, W_i] float, normalised: one tensor per size
        layers: int | Sequence[int] | None = None,
    ) -> list[BackboneOutput]:
        """The result of `forward` for each tensor, in one pass if the network can do that."""
        return [self(pixels, layers=layers) for pixels in batches]

    def grid_of(
        self,
        pixels: Tensor,  # [B, 3, H_px, W_px]
        layer: int = -1,
    ) -> tuple[int, int]:
        """(h, w) in patches of a layer.  Raises: InputError or InputTypeError for a tensor that does not fit."""
        raise NotImplementedError

    def stride(self, layer: int = -1) -> int:
        """Side of a patch of a layer in pixels."""
        raise NotImplementedError

    def width(self, layer: int = -1) -> int:
        """C of a layer."""
        raise NotImplementedError

    @property
    def main_weight(self) -> Tensor:
        """A weight of a matrix product, of any shape; its device and dtype are those of the network."""
        raise NotImplementedError

    def description(self) -> dict[str, Any]:
        """All settings that features depend on besides the weights, as JSON values."""
        raise NotImplementedError

    def init_weights(self, layerscale: float = 1e-5) -> None:
        """Initialise every tensor at random, as in the papers' training code."""
        raise NotImplementedError

    def set_attention(self, implementation: str | Callable[..., Tensor]) -> None:
        """Choose the attention; a network without attention takes only "auto".

        Raises: InputError, UnsupportedError.
        """
        if implementation != "auto":
            raise UnsupportedError(
                f"attn_implementation={implementation!r} needs attention, which this network does not have"
            )

    def why_not_triton(self) -> str | None:
        """Why attention cannot run as the Triton kernel here; None if it can."""
        return "this network has no attention"

    def summary(self) -> str:
        """The architecture in one line."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.main_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the linear layers."""
        return self.main_weight.dtype

    @property
    def embed_dim(self) -> int:
        """C of the last layer."""
        return self.width()

    num_features = embed_dim

    @property
    def patch_size(self) -> int:
        """Side of a patch of the last layer in pixels."""
        return self.stride()

    @property
    def n_blocks(self) -> int:
        """Number of layers that can be requested with `layers`."""
        return len(self.blocks)

    why_not_padded: str | None = None  # why images cannot be padded with the mean colour
    num_register_tokens = 0  # R
    num_prefix_tokens = 1  # class token and registers, before the patches


def normalised(
    pixels: Tensor,  # [B, 3, H_px, W_px] uint8, or float and normalised already
    scale: Scale,
) -> Tensor:
    """Pixels that a network takes, [B, 3, H_px, W_px] float, on the device of the given pixels."""
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
    """[B, P, C] -> [B, C, h, w], a view."""
    return patch_tokens.unflatten(1, grid).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def resolve_layers(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    """Block indices from 0: an int means the last n blocks, a sequence these blocks, and negative numbers count from
    the end.

    Raises: LayerError for a block that does not exist, InputTypeError for other types.
    """
    if layers is None:
        return []
    try:
        single = isinstance(layers, int) or getattr(layers, "ndim", 1) == 0  # also scalars of numpy and torch
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
    """(h, w) in patches of pixels [B, channels, H_px, W_px]; `size` is the side of a patch in pixels.

    Raises: InputTypeError if `pixels` is no float tensor, InputError for another shape or sides of no whole patches.
    """
    if not isinstance(pixels, Tensor):
        raise InputTypeError(
            f"the model takes a tensor, got {type(pixels).__name__}; use extract_features() for images"
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
            f"{nearest[0]}x{nearest[1]}, and extract_features(fit='native') resizes to it"
        )
    return height // size, width // size


@one_node
def without_layers(pixels: Tensor, layers: Any) -> Tensor:
    """Returns pixels [B, 3, H_px, W_px]; for graphs of torch.fx, whose layers are chosen at tracing.

    Raises: InputError if `layers` is given.
    """
    if layers is not None:
        raise InputError(f"this graph was traced without layers, and layers={layers!r} was given; trace it with layers")
    return pixels
