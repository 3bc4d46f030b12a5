"""Layer norm of the residual stream, alone or together with the branch that is added first: one pass over memory.

A program owns a few rows, whole: the sum, its mean and its variance are taken from registers, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config
from .launch import launch

__all__ = ["layer_norm", "norm_config", "norm_kernel", "residual_norm"]


@triton.jit(do_not_specialize=["rows"])
def norm_kernel(
    X, BRANCH, SCALE, WEIGHT, BIAS, SUM, OUT, rows, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """SUM = X + BRANCH SCALE, OUT = its norm.  Without BRANCH there is no SUM, without SCALE it is 1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (channel < C)
    at = row.to(tl.int64) * C + channel
    x = tl.load(X + at, mask=inside, other=0.0)
    if BRANCH is not None:
        branch = tl.load(BRANCH + at, mask=inside, other=0.0).to(tl.float32)
        if SCALE is not None:
            branch *= tl.load(SCALE + channel, mask=channel < C, other=0.0).to(tl.float32)
        x += branch
        tl.store(SUM + at, x, mask=inside)
    mean = tl.sum(x, 1)[:, None] / C
    apart = tl.where(channel < C, x - mean, 0.0)
    spread = tl.rsqrt(tl.sum(apart * apart, 1)[:, None] / C + eps)
    weight = tl.load(WEIGHT + channel, mask=channel < C, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + channel, mask=channel < C, other=0.0).to(tl.float32)
    tl.store(OUT + at, (apart * spread * weight + bias).to(OUT.dtype.element_ty), mask=inside)


def norm_config(channels: int) -> Config:
    """Rows and channels of a tile, 16 numbers a thread or the whole of a wide row."""
    block = triton.next_power_of_2(channels)
    return Config(max(1, 2048 // block), block, 4 if block <= 2048 else 8, 1)


def _run(
    x: Tensor,
    branch: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1]
    if x.dtype != torch.float32:
        raise ValueError(f"the stream is float32; got {x.dtype}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"a branch has the shape of its stream, {list(x.shape)}; got {list(branch.shape)}")
    for vector in (scale, weight, bias):
        if vector is not None and vector.shape != (channels,):
            raise ValueError(f"scale, weight and bias are [{channels}], a number a channel; got {list(vector.shape)}")
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    branch = branch if branch is None else branch.contiguous()
    scale = scale if scale is None else scale.contiguous()
    total = x if branch is None else torch.empty_like(x)
    out = x.new_empty(x.shape, dtype=out_dtype)
    if out.numel():
        config, rows = norm_config(channels), x.numel() // channels
        launch(
            norm_kernel, triton.cdiv(rows, config.block_m), config,
            x, branch, scale, weight, bias, total, out, rows, eps,
            C=channels, BLOCK=config.block_n, ROWS=config.block_m,
        )  # fmt: skip
    return total, out


def residual_norm(
    x: Tensor,  # [..., C] float32
    branch: Tensor,  # [..., C], float32 or 16 bits
    scale: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + branch scale, float32, and its layer norm in `out_dtype`.

    Raises: ValueError for shapes and dtypes that the kernel is not made for.
    """
    return _run(x, branch, scale, weight, bias, eps, out_dtype)


def layer_norm(
    x: Tensor,  # [..., C] float32
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Layer norm in float32, [..., C] in `out_dtype`.

    Raises: ValueError for shapes and dtypes that the kernel is not made for.
    """
    return _run(x, None, None, weight, bias, eps, out_dtype)[1]
