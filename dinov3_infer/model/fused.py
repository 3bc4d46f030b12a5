"""The operators between the products of a transformer, each in one pass over memory.

The definitions are plain torch, run on a CPU and judge the kernels; on a GPU each operator is one Triton kernel.  Every
one computes in float32 at least and rounds once, when it stores.  The two norms have a gradient, one kernel as well.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import launch, why_not_triton

__all__ = ["count_flops", "kernel_dtype", "layer_norm", "residual_norm", "swiglu", "unfold"]


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


def _norm_backward(
    grad_sum: Tensor | None,  # of the stream after the branch; None: a norm alone
    grad_out: Tensor,
    x: Tensor,  # [..., C], the input of the norm
    branch: Tensor | None,  # without a scale its dtype alone matters, and it may be [0]
    scale: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, of the branch, [0] without one, and of weight, bias and scale [3, C], [2, C] without it.

    With n the normed x before weight and bias, s its factor and g the gradient of n: s (g - mean(g) - n mean(g n)).
    """
    x = _wide(x)
    grad, rows = grad_out.to(x.dtype), tuple(range(x.ndim - 1))
    apart = x - x.mean(-1, keepdim=True)
    spread = (apart.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = apart * spread
    sums = [(grad * normal).sum(rows), grad.sum(rows)]
    grad = grad * weight.to(x.dtype)
    total = (grad - grad.mean(-1, keepdim=True) - normal * (grad * normal).mean(-1, keepdim=True)) * spread
    total = total if grad_sum is None else total + grad_sum
    if branch is None:
        return total, x.new_empty(0), torch.stack(sums)
    if scale is None:
        return total, total.to(branch.dtype, copy=True), torch.stack(sums)
    sums.append((total * branch.to(x.dtype)).sum(rows))
    return total, (total * scale.to(x.dtype)).to(branch.dtype, copy=True), torch.stack(sums)


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


def _norm_backward_shapes(
    grad_sum: Any, grad_out: Tensor, x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, eps: float
) -> Any:
    of_branch = x.new_empty(0) if branch is None else x.new_empty(x.shape, dtype=branch.dtype)
    return x.new_empty(x.shape), of_branch, x.new_empty(2 if scale is None else 3, x.shape[-1])


def _swiglu_shapes(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


def _unfold_shapes(images: Tensor, mean: Any, std: Any, patch: int, out_dtype: torch.dtype) -> Tensor:
    batch, channels, height, width = images.shape
    shape = (batch, (height // patch) * (width // patch), channels * patch * patch)
    return images.new_empty(shape, dtype=out_dtype)


# --- the operators, which compilers see as one node each -----------------------------------------------------------

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
    "norm_backward": (
        "(Tensor? grad_sum, Tensor grad_out, Tensor x, Tensor? branch, Tensor? scale, Tensor weight, float eps)"
        " -> (Tensor, Tensor, Tensor)",
        _norm_backward,
        _norm_backward_shapes,
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
    """Tells torch's FLOP counter that the operators have none: it counts products, and no norms or activations."""
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
    torch.library.impl(f"dinov3_infer::{_name}", "meta")(_shapes)


# --- gradients -----------------------------------------------------------------------------------------------------


class _Norm(torch.autograd.Function):
    """Keeps the stream, which its neighbours keep too, and of a branch without LayerScale its dtype alone.

    A function and not a gradient of the operators: torch looks for that in each call, without gradients too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
        out_dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        operators, ctx.eps, ctx.dtypes = torch.ops.dinov3_infer, eps, (weight.dtype, bias.dtype)
        if branch is None:
            out = operators.layer_norm(x, weight, bias, eps, out_dtype)
            ctx.save_for_backward(x, None, None, weight)
            return out
        total, out = operators.residual_norm(x, branch, scale, weight, bias, eps, out_dtype)
        ctx.save_for_backward(total, branch.new_empty(0) if scale is None else branch, scale, weight)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, branch, scale, weight = ctx.saved_tensors
        grad_sum = None if branch is None else gradients[0]
        of_x, of_branch, sums = torch.ops.dinov3_infer.norm_backward(
            grad_sum, gradients[-1], x, branch, scale, weight, ctx.eps
        )
        of_weight, of_bias = (t.to(dtype) for t, dtype in zip(sums[:2], ctx.dtypes, strict=True))
        of_scale = None if scale is None else sums[2].to(scale.dtype)
        return of_x, None if branch is None else of_branch, of_scale, of_weight, of_bias, None, None


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# --- the functions to call -------------------------------------------------------------------------------------------


def kernel_dtype(x: Tensor, norm: Any) -> torch.dtype | None:
    """The dtype of the products after a norm module, where one kernel can norm x and round it; None elsewhere."""
    kind = x.device.type
    if kind not in ("cuda", "xpu") or x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
        return None
    dtype, plain = torch.get_autocast_dtype(kind), type(norm.weight) in (Tensor, torch.nn.Parameter)
    return dtype if plain and why_not_triton(x.device, dtype, 64) is None else None


def layer_norm(
    x: Tensor,  # [..., C], float32
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Layer norm of the stream, [..., C] in the dtype of the product that follows.  It can be differentiated once."""
    if _differentiable(x, weight, bias):
        return _Norm.apply(x, None, None, weight, bias, eps, out_dtype)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.dinov3_infer.layer_norm(x, weight, bias, eps, out_dtype)  # type: ignore[no-any-return]


def residual_norm(
    x: Tensor,  # [..., C], float32: the stream
    branch: Tensor,  # [..., C], float32 or 16 bits: the result of a product
    scale: Tensor | None,  # [C], LayerScale; None: 1
    weight: Tensor,  # [C], of the norm
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The stream after a branch, x + branch scale in the dtype of x, and its layer norm in `out_dtype`.

    It can be differentiated once.
    """
    if _differentiable(x, branch, scale, weight, bias):
        return _Norm.apply(x, branch, scale, weight, bias, eps, out_dtype)  # type: ignore[no-any-return,no-untyped-call]
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
