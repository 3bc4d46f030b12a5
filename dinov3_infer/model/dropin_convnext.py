"""Methods of a ConvNeXt with names of Meta or timm, and their results; see `dropin`."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from .convnext import ConvNeXt
from .dropin import paired
from .network import resolve_layers

__all__ = ["forward_features", "forward_intermediates", "get_intermediate_layers"]


def forward_features(
    model: ConvNeXt,
    x: Tensor | Sequence[Tensor],  # [B, 3, H_px, W_px] normalised, or one such tensor per crop size
    masks: Any = None,  # returned unused, as in Meta's code
) -> dict[str, Any] | list[dict[str, Any]]:
    """Meta's dictionary of tokens (for a list of crops, a list of dictionaries).

    Returns: `x_norm_clstoken` [B, C], `x_norm_patchtokens` [B, P, C] and `x_storage_tokens` [B, 0, C], and before the
    norm, without the class token, `x_prenorm` [B, P, C].

    Source: dinov3/models/convnext.py at 6876159.
    """
    if not isinstance(x, Tensor):
        return [forward_features(model, crop, mask) for crop, mask in paired(x, masks)]  # type: ignore[misc]
    last = model.run_stages(x)[-1]
    cls_token, registers, patches = model.tokens(last, norm=True)
    return {
        "x_norm_clstoken": cls_token,
        "x_storage_tokens": registers,
        "x_norm_patchtokens": patches,
        "x_prenorm": last.flatten(1, 2),
        "masks": masks,
    }


def get_intermediate_layers(
    model: ConvNeXt,
    x: Tensor,  # [B, 3, H_px, W_px] normalised
    n: int | Sequence[int] = 1,
    reshape: bool = False,
    return_class_token: bool = False,
    norm: bool = True,
    patch_size: int | None = None,
) -> tuple[Any, ...]:
    """Meta's: patches of the last n stages, or of the stages in n, ordered from shallow to deep.

    Each element is the patches [B, P, C] ([B, C, h, w] with `reshape`), or a pair of the patches and the mean of the
    map [B, C].  With `norm` the last stage passes through the final norm; the others have none.  `patch_size`, which
    Meta passes to the constructor, resizes every map to a grid of patches of so many pixels.

    Raises: LayerError for a stage that does not exist, InputError for one that is given twice.
    Source: dinov3/models/convnext.py at 6876159.
    """
    asked = resolve_layers(n, model.n_blocks)
    if len(set(asked)) != len(asked):
        raise InputError(f"get_intermediate_layers got a stage twice in n={n}; name each stage once")
    maps, results = model.run_stages(x), []
    for i in sorted(asked):
        cls_token, dense = maps[i].mean(dim=(1, 2)), maps[i]
        if patch_size is not None:
            dense = _resized(dense, (x.shape[2] // patch_size, x.shape[3] // patch_size))
        if norm and i == len(maps) - 1:
            cls_token, dense = model.norm(cls_token), model.norm(dense)
        patches = dense.permute(0, 3, 1, 2).contiguous() if reshape else dense.flatten(1, 2)
        results.append((patches, cls_token) if return_class_token else patches)
    return tuple(results)


def _resized(x: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, h, w, C]
    if tuple(x.shape[1:3]) == grid:
        return x
    found = F.interpolate(x.permute(0, 3, 1, 2), size=grid, mode="bilinear", antialias=True)
    return found.permute(0, 2, 3, 1)


def forward_intermediates(
    model: ConvNeXt,
    x: Tensor,  # [B, 3, H_px, W_px] normalised
    indices: int | Sequence[int] | None = None,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
) -> Any:
    """timm's: the raw map of the last stage [B, C, h, w], and the maps of some stages, ordered from shallow to deep.

    Args:
        indices: None for every stage, an int for the last n stages, or a list of stages.
        norm: Has no effect, as in timm.
        stop_early: Has no effect on the result.
        output_fmt: "NCHW".
        intermediates_only: Return only the intermediates.

    Raises: InputError for another `output_fmt`, LayerError for a stage that does not exist.

    Source: timm/models/convnext.py, `ConvNeXt.forward_intermediates`, release 1.0.31.
    """
    if output_fmt != "NCHW":
        raise InputError(f"output_fmt is 'NCHW' for a ConvNeXt, got {output_fmt!r}")
    wanted = sorted(set(resolve_layers(model.n_blocks if indices is None else indices, model.n_blocks)))
    maps = [stage.permute(0, 3, 1, 2).contiguous() for stage in model.run_stages(x)]
    intermediates = [maps[i] for i in wanted]
    return intermediates if intermediates_only else (maps[-1], intermediates)
