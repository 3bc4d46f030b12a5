"""What stands between the products of a transformer, as operators of one pass over memory each.

The definitions are plain torch, run on a CPU and judge the kernels; on a GPU each operator is one Triton kernel.  None
has a gradient.  Every one computes in float32 at least and rounds once, when it stores.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import launch

__all__ = ["count_flops", "layer_norm", "residual_norm", "swiglu", "unfold"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- the definitions -----------------------------------------------------------------------------------------------


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    x = _wide(x)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(out_dtype)


def _residual_norm(
    x: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    branch = branch.to(x.dtype)
    x = x + (branch if scale is None else branch * scale.to(x.dtype))
    return x, _layer_norm(x, weight, bias, eps, out_dtype)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return (gate / (1.0 + torch.exp(-gate)) * up).to(gate_up.dtype)


def _unfold(images: Tensor, mean: Sequence[float], std: Sequence[float], patch: int, out_dtype: torch.dtype) -> Tensor:
    middle, spread = (torch.tensor(v, dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (mean, std))
    pixels = images / 255.0 if images.dtype == torch.uint8 else _wide(images)
    tiles: Tensor = (
        ((pixels - middle) / spread).unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    )  # [B, 3, h, p, w, p]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2).to(out_dtype)


# --- their shapes ------------------------------------------------------------------------------------------------


def _layer_norm_shapes(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype)


def _residual_norm_shapes(
    x: Tensor, branch: Tensor, scale: Any, weight: Any, bias: Any, eps: float, out_dtype: torch.dtype
) -> Any:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype)


def _swiglu_shapes(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _unfold_shapes(images: Tensor, mean: Any, std: Any, patch: int, out_dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = images.shape
    shape = (batch, (height // patch) * (width // patch), channels * patch * patch)
    return images.new_empty(shape, dtype=out_dtype)


# --- the operators: what kernels implement, opaque to compilers ----------------------------------------------------

OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "layer_norm": (
        "(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType out_dtype) -> Tensor",
        _layer_norm,
        _layer_norm_shapes,
    ),
    "residual_norm": (
        "(Tensor x, Tensor branch, Tensor? scale, Tensor weight, Tensor bias, float eps, ScalarType out_dtype)"
        " -> (Tensor, Tensor)",
        _residual_norm,
        _residual_norm_shapes,
    ),
    "swiglu": ("(Tensor gate_up) -> Tensor", _swiglu, _swiglu_shapes),
    "unfold": (
        "(Tensor images, float[] mean, float[] std, int patch, ScalarType out_dtype) -> Tensor",
        _unfold,
        _unfold_shapes,
    ),
}


@cache
def count_flops() -> None:
    """Tells torch's FLOP counter of the operators: none, as it counts products alone, and no norm or activation."""
    from torch.utils.flop_counter import register_flop_formula

    for name in OPERATORS:
        register_flop_formula(getattr(torch.ops.dinov3_infer, name))(lambda *_, **__: 0)


def _launch(launcher: str, *arguments: Any) -> Any:
    count_flops()
    return launch(launcher, *arguments)


for _name, (_signature, _definition, _shapes) in OPERATORS.items():
    torch.library.define(f"dinov3_infer::{_name}", _signature)
    torch.library.impl(f"dinov3_infer::{_name}", "cpu")(_definition)
    torch.library.impl(f"dinov3_infer::{_name}", ("cuda", "xpu"), partial(_launch, _name))
    torch.library.register_fake(f"dinov3_infer::{_name}", _shapes)


# --- what callers use ----------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor,  # [..., C], float32
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Layer norm of the stream, [..., C] in the dtype of the product that follows."""
    return torch.ops.dinov3_infer.layer_norm(x, weight, bias, eps, out_dtype)  # type: ignore[no-any-return]


def residual_norm(
    x: Tensor,  # [..., C], float32: the stream
    branch: Tensor,  # [..., C], float32 or 16 bits: what a product has given
    scale: Tensor | None,  # [C], LayerScale; None: 1
    weight: Tensor,  # [C], of the norm
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The stream after a branch, x + branch scale in the dtype of x, and its layer norm in `out_dtype`."""
    return torch.ops.dinov3_infer.residual_norm(x, branch, scale, weight, bias, eps, out_dtype)  # type: ignore[no-any-return]


def swiglu(
    gate_up: Tensor,  # [..., 2F], the gate first
) -> Tensor:
    """silu(gate) up, [..., F] in the dtype of the input."""
    return torch.ops.dinov3_infer.swiglu(gate_up)  # type: ignore[no-any-return]


def unfold(
    images: Tensor,  # [B, 3, H_px, W_px] uint8, or floats that are 1 where uint8 is 255
    mean: Sequence[float],  # of red, green and blue, in 0 to 1
    std: Sequence[float],
    patch: int,  # pixels; divides H_px and W_px
    out_dtype: torch.dtype,
) -> Tensor:
    """Normalised patches as rows, [B, P, 3 patch^2], for the patch embedding as one product.

    Patches are row-major, the columns in the order of `PatchEmbed.proj.weight.flatten(1)`.
    """
    return torch.ops.dinov3_infer.unfold(images, list(mean), list(std), patch, out_dtype)  # type: ignore[no-any-return]
