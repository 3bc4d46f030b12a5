"""Methods that carry Meta's, timm's or transformers' names do what those do: code written for them runs unchanged.

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
    """Meta's dictionary of tokens (a list of them for a list of crops).

    After the final norm `x_norm_clstoken` [B, C], `x_norm_patchtokens` [B, P, C] and the registers [B, R, C], under
    DINOv3's name `x_storage_tokens` and DINOv2's `x_norm_regtokens`; before it `x_prenorm` [B, N, C].

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
    """Each crop with its mask, or None.  Raises InputError for another number of masks."""
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
    """Meta's: patches of the last n blocks, or of the blocks in n, always from shallow to deep.

    Each element is the patches [B, P, C] ([B, C, h, w] with `reshape`), or a tuple of them with the class token
    [B, C] and the registers [B, R, C] as asked for.  With `norm` every layer passes through the final norm.

    Raises: LayerError for a layer that does not exist, InputError for one asked for twice.
    Source: dinov3/models/vision_transformer.py:261-319 at 6876159.
    """
    asked = resolve_layers(n, model.config.depth)
    indices = sorted(set(asked))
    if len(indices) != len(asked):
        raise InputError(f"get_intermediate_layers got a block twice in n={n}; name each once")
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
    """Meta's, of DINO: the whole attention matrix of the last block, [B, H, N, N].

    It grows with the square of N; `attention_maps` computes single rows.

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
    """timm's: all tokens after the final norm [B, N, C], and the patches of some blocks, shallow to deep.

    `indices`: None for every block, an int for the last n, a list for these.  The intermediates are [B, C, h, w],
    or [B, P, C] with `output_fmt="NLC"`; with `return_prefix_tokens` pairs of them and the prefix tokens
    [B, 1 + R, C].  They do not pass through the final norm unless `norm` says so.

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
    """timm's: for each block its "module", "num_chs" and "reduction".

    Source: timm/models/_features.py, `FeatureInfo`, release 1.0.31.
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """C of every block, or of those in `idx`."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Pixels of a side of a patch."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Such as "blocks.0"."""
        return self._get("module", idx)

    def _get(self, key: str, idx: int | Sequence[int] | None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]


def feature_info(model: VisionTransformer) -> FeatureInfo:
    """timm's description of what `forward_intermediates` gives.

    Example:
        >>> bb.feature_info.channels(), bb.feature_info.reduction(0), bb.feature_info.module_name(0)
        ([192, 192, 192, 192], 16, 'blocks.0')
    """
    return FeatureInfo(
        {"module": f"blocks.{i}", "num_chs": model.width(i), "reduction": model.stride(i)}
        for i in range(model.n_blocks)
    )


def set_grad_checkpointing(model: VisionTransformer, enable: bool = True) -> None:
    """timm's: the backward pass computes each block anew instead of keeping its activations.

    `forward_packed` with `drop_path` keeps them, since its draws would differ the second time.

    Example:
        >>> bb.train().set_grad_checkpointing()
        >>> bb(pixels).cls_token.sum().backward()
    """
    model.grad_checkpointing = bool(enable)


def gradient_checkpointing_enable(
    model: VisionTransformer, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> None:
    """transformers' name for `set_grad_checkpointing`; the non-reentrant kind of torch is always taken."""
    set_grad_checkpointing(model)


def gradient_checkpointing_disable(model: VisionTransformer) -> None:
    """transformers' name for `set_grad_checkpointing(False)`."""
    set_grad_checkpointing(model, enable=False)
