"""Layer norm of the residual stream, alone or together with the branch that is added first, and its gradient.

Each is one pass over memory.  A program owns whole rows: their sum, mean and variance are computed in registers, in
float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, processors
from .launch import launch

__all__ = ["layer_norm", "norm_backward", "norm_backward_kernel", "norm_config", "norm_kernel", "residual_norm"]


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


@triton.jit(do_not_specialize=["rows", "programs"])
def norm_backward_kernel(
    X, BRANCH, SCALE, WEIGHT, GRAD_SUM, GRAD_OUT, GRAD_X, GRAD_BRANCH, PARTS, rows, programs, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of `norm_kernel`; X is what it stored as SUM.

    A program takes each `programs`-th tile of rows and stores its sums over them, the gradients of weight, bias and
    scale, in its row of PARTS [programs, 3, C].  Nothing is added atomically, so that two runs have equal bits.  A norm
    alone has no BRANCH, SCALE, GRAD_SUM and GRAD_BRANCH; without SCALE it is 1, and BRANCH is not read.
    """
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < C
    weight = tl.load(WEIGHT + channel, mask=known, other=0.0).to(tl.float32)
    to_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    to_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    to_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, programs * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & known
        at = row.to(tl.int64) * C + channel
        x = tl.load(X + at, mask=inside, other=0.0)
        grad = tl.load(GRAD_OUT + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1)[:, None] / C
        apart = tl.where(known, x - mean, 0.0)
        spread = tl.rsqrt(tl.sum(apart * apart, 1)[:, None] / C + eps)
        normal = apart * spread
        to_weight += grad * normal
        to_bias += grad
        grad *= weight
        even = tl.sum(grad, 1)[:, None] / C
        along = tl.sum(grad * normal, 1)[:, None] / C
        grad = (grad - even - normal * along) * spread
        if GRAD_SUM is not None:
            grad += tl.load(GRAD_SUM + at, mask=inside, other=0.0)
        tl.store(GRAD_X + at, grad, mask=inside)
        if GRAD_BRANCH is not None:
            if SCALE is not None:
                to_scale += grad * tl.load(BRANCH + at, mask=inside, other=0.0).to(tl.float32)
                grad *= tl.load(SCALE + channel, mask=known, other=0.0).to(tl.float32)
            tl.store(GRAD_BRANCH + at, grad.to(GRAD_BRANCH.dtype.element_ty), mask=inside)
    channels = tl.arange(0, BLOCK)
    to = PARTS + tl.program_id(0) * 3 * C + channels
    tl.store(to, tl.sum(to_weight, 0), mask=channels < C)
    tl.store(to + C, tl.sum(to_bias, 0), mask=channels < C)
    if SCALE is not None:
        tl.store(to + 2 * C, tl.sum(to_scale, 0), mask=channels < C)


def norm_config(channels: int) -> Config:
    """Rows and channels of a tile, 8 numbers a thread, or the whole of a wide row."""
    block = triton.next_power_of_2(channels)
    return Config(max(1, 2048 // block), block, 8, 1)


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


def norm_backward(
    grad_sum: Tensor | None,  # [..., C] float32, of the stream after the branch; None: a norm alone
    grad_out: Tensor,  # [..., C], of the normed stream
    x: Tensor,  # [..., C] float32, the stream that was normed
    branch: Tensor | None,  # [..., C] float32 or 16 bits; without a scale its dtype alone matters, and it may be [0]
    scale: Tensor | None,  # [C]
    weight: Tensor,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the stream, float32, of the branch in its dtype, [0] without one, and of weight, bias and scale.

    The last are float32 [3, C], or [2, C] without a scale.

    Raises: ValueError for shapes and dtypes that the kernel is not made for.
    """
    channels = x.shape[-1]
    if x.dtype != torch.float32 or (grad_sum is not None and grad_sum.dtype != torch.float32):
        raise ValueError(f"the stream and its gradient are float32; got {x.dtype}")
    for tensor in (grad_sum, grad_out, branch if scale is not None else None):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(f"a gradient has the shape of its stream, {list(x.shape)}; got {list(tensor.shape)}")
    x, grad_out, weight = x.contiguous(), grad_out.contiguous(), weight.contiguous()
    grad_sum = grad_sum if grad_sum is None else grad_sum.contiguous()
    config, rows = norm_config(channels), x.numel() // channels
    programs = min(triton.cdiv(rows, config.block_m), 2 * processors(x.device))
    grad_x, parts = torch.empty_like(x), x.new_empty((programs, 3, channels))
    grad_branch = x.new_empty(0) if branch is None else x.new_empty(x.shape, dtype=branch.dtype)
    if rows:
        launch(
            norm_backward_kernel, programs, config,
            x, branch.contiguous() if branch is not None and scale is not None else None,
            scale if scale is None else scale.contiguous(), weight, grad_sum, grad_out, grad_x,
            None if branch is None else grad_branch, parts, rows, programs, eps,
            C=channels, BLOCK=config.block_n, ROWS=config.block_m,
        )  # fmt: skip
    return grad_x, grad_branch, parts[:, : 2 if scale is None else 3].sum(0)
