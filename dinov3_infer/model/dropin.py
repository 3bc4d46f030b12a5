"""Methods with names of Meta, timm or transformers, and their results, so that code written for these runs unchanged.

`ViTBackbone` has these functions as its methods.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .introspection import attention_rows
from .network import as_map, resolve_layers
from .vit import VisionTransformer

__all__ = [
    "FeatureInfo",
    "feature_info",
    "forward_features",
    "forward_intermediates",
    "get_intermediate_layers",
    "get_last_selfattention",
    "gradient_checkpointing_disable",
    "gradient_checkpointing_enable",
    "paired",
    "set_grad_checkpointing",
]


def forward_features(
    model: VisionTransformer,
    x: Tensor | Sequence[Tensor],  # [B, 3, H_px, W_px] normalised, or one such tensor per crop size
    masks: Tensor | Sequence[Tensor | None] | None = None,  # [B, P] bool
) -> dict[str, Any] | list[dict[str, Any]]:
    """Meta's dictionary of tokens (for a list of crops, a list of dictionaries).

    Returns: After the final norm `x_norm_clstoken` [B, C], `x_norm_patchtokens` [B, P, C] and the registers [B, R, C]
    under DINOv3's name `x_storage_tokens` and DINOv2's `x_norm_regtokens`; before the norm `x_prenorm` [B, N, C].

    Raises: InputError if the masks do not fit the crops.

    Source: dinov3/models/vision_transformer.py:203-259 at 6876159.
    """
    if not isinstance(x, Tensor):
        return [forward_features(model, crop, mask) for crop, mask in paired(x, masks)]  # type: ignore[misc]
    if masks is not None and not isinstance(masks, Tensor):
        raise InputError("forward_features got a list of masks for a single tensor; give one mask [B, P]")
    stream, _ = model.run_blocks(x, masks)
    cls_token, registers, patches = model.split(model.normed(stream))
    return {
        "x_norm_clstoken": cls_token,
        "x_storage_tokens": registers,
        "x_norm_regtokens": registers,
        "x_norm_patchtokens": patches,
        "x_prenorm": stream,
        "masks": masks,
    }


def paired(crops: Sequence[Tensor], masks: Any) -> list[tuple[Tensor, Any]]:
    """Pair each crop [B, 3, H_px, W_px] with its mask [B, P] or None.  Raises: InputError if their numbers differ."""
    each: Sequence[Any] = [None] * len(crops) if masks is None else list(masks)
    if len(each) != len(crops):
        raise InputError(
            f"forward_features got {len(crops)} crops and {len(each)} masks; give one mask or None for each"
        )
    return list(zip(crops, each, strict=True))


def get_intermediate_layers(
    model: VisionTransformer,
    x: Tensor,  # [B, 3, H_px, W_px] normalised
    n: int | Sequence[int] = 1,
    reshape: bool = False,
    return_class_token: bool = False,
    return_extra_tokens: bool = False,
    norm: bool = True,
) -> tuple[Any, ...]:
    """Meta's: patches of the last n blocks, or of the blocks in n, ordered from shallow to deep.

    Each element is the patches [B, P, C] ([B, C, h, w] with `reshape`), or a tuple of the patches with the class token
    [B, C] and the registers [B, R, C] if requested.  With `norm` every layer passes through the final norm.

    Raises: LayerError for a layer that does not exist, InputError for one that is given twice.
    Source: dinov3/models/vision_transformer.py:261-319 at 6876159.
    """
    asked = resolve_layers(n, model.config.depth)
    indices = sorted(set(asked))
    if len(indices) != len(asked):
        raise InputError(f"get_intermediate_layers got a block twice in n={n}; name each block once")
    _, taken = model.run_blocks(x, indices=indices, stop_early=True)
    results: list[Any] = []
    for i in indices:
        cls_token, registers, patches = model.split(model.normed(taken[i]) if norm else taken[i])
        if reshape:
            patches = as_map(patches, model.grid_of(x)).contiguous()
        extra = (*([cls_token] if return_class_token else []), *([registers] if return_extra_tokens else []))
        results.append((patches, *extra) if extra else patches)
    return tuple(results)


def get_last_selfattention(model: VisionTransformer, x: Tensor) -> Tensor:  # [B, 3, H_px, W_px] normalised
    """DINO's, from Meta: the whole attention matrix of the last block, [B, H, N, N].

    Its size grows with the square of N; `attention_maps` computes single rows.

    Source: dino/vision_transformer.py of facebookresearch/dino.
    """
    return attention_rows(model, x, model.config.depth - 1)


def forward_intermediates(
    model: VisionTransformer,
    x: Tensor,  # [B, 3, H_px, W_px] normalised
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """timm's: all tokens after the final norm [B, N, C], and the patches of some blocks, ordered from shallow to deep.

    Args:
        indices: None for every block, an int for the last n blocks, or a list of blocks.
        return_prefix_tokens: Return pairs of patches and prefix tokens [B, 1 + R, C].
        norm: Apply the final norm to the intermediates.
        stop_early: Stop after the last of `indices`.
        output_fmt: "NCHW" for [B, C, h, w], "NLC" for [B, P, C].
        intermediates_only: Return only the intermediates.

    Raises: InputError for another `output_fmt`, LayerError for a block that does not exist.

    Source: timm/models/eva.py, `Eva.forward_intermediates`, release 1.0.31.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise InputError(f"output_fmt is 'NCHW' or 'NLC', got {output_fmt!r}")
    wanted = resolve_layers(model.config.depth if indices is None else indices, model.config.depth)
    stream, taken = model.run_blocks(x, indices=wanted, stop_early=stop_early)
    results: list[Any] = []
    for i in sorted(taken):
        cls_token, registers, patches = model.split(model.normed(taken[i]) if norm else taken[i])
        if output_fmt == "NCHW":
            patches = as_map(patches, model.grid_of(x)).contiguous()
        prefix = torch.cat((cls_token[:, None], registers), dim=1)
        results.append((patches, prefix) if return_prefix_tokens else patches)
    return results if intermediates_only else (model.normed(stream), results)


class FeatureInfo(list[dict[str, Any]]):
    """timm's: "module", "num_chs" and "reduction" of each block.

    Source: timm/models/_features.py, `FeatureInfo`, release 1.0.31.
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """C of every block, or of those in `idx`."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Stride in pixels of every block, or of those in `idx`."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Name of every block, or of those in `idx`, such as "blocks.0"."""
        return self._get("module", idx)

    def _get(self, key: str, idx: int | Sequence[int] | None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]


def feature_info(model: VisionTransformer) -> FeatureInfo:
    """timm's description of the result of `forward_intermediates`.

    Example:
        >>> bb.feature_info.channels(), bb.feature_info.reduction(0), bb.feature_info.module_name(0)
        ([192, 192, 192, 192], 16, 'blocks.0')
    """
    return FeatureInfo(
        {"module": f"blocks.{i}", "num_chs": model.width(i), "reduction": model.stride(i)}
        for i in range(model.n_blocks)
    )


def set_grad_checkpointing(model: VisionTransformer, enable: bool = True) -> None:
    """timm's: recompute each block in the backward pass instead of keeping its activations.

    `forward_packed` with `drop_path` keeps activations, since its random draws would differ the second time.

    Example:
        >>> bb.train().set_grad_checkpointing()
        >>> bb(pixels).cls_token.sum().backward()
    """
    model.grad_checkpointing = bool(enable)


def gradient_checkpointing_enable(
    model: VisionTransformer, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> None:
    """transformers' name for `set_grad_checkpointing`; always non-reentrant."""
    set_grad_checkpointing(model)


def gradient_checkpointing_disable(model: VisionTransformer) -> None:
    """transformers' name for `set_grad_checkpointing(False)`."""
    set_grad_checkpointing(model, enable=False)
