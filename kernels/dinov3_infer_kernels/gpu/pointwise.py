"""SwiGLU after its product, and the patches of an image before the first product: one pass over memory each."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config
from .launch import launch

__all__ = ["SWIGLU", "swiglu", "swiglu_kernel", "unfold", "unfold_config", "unfold_kernel"]

SWIGLU = Config(2, 512, 4, 1)  # rows and columns of a tile: 512 divides the width of every released model


@triton.jit(do_not_specialize=["rows"])
def swiglu_kernel(GATE_UP, OUT, rows, width, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """silu(gate) up, in float32."""
    blocks = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    row = row.to(tl.int64)
    gate = tl.load(GATE_UP + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(OUT + row * width + column, out.to(OUT.dtype.element_ty), mask=inside)


def swiglu(
    gate_up: Tensor,  # [..., 2F], float32 or 16 bits
) -> Tensor:
    """silu(gate) up, [..., F].

    Raises: ValueError for an odd width.
    """
    width, odd = divmod(gate_up.shape[-1], 2)
    if odd:
        raise ValueError(f"gate and up have one width; got {gate_up.shape[-1]} for both")
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    if out.numel():
        rows = out.numel() // width
        programs = triton.cdiv(rows, SWIGLU.block_m) * triton.cdiv(width, SWIGLU.block_n)
        launch(swiglu_kernel, programs, SWIGLU, gate_up, out, rows, width, BLOCK=SWIGLU.block_n, ROWS=SWIGLU.block_m)
    return out


@triton.jit
def _by_channel(channel, red, green, blue):
    return tl.where(channel == 0, red, tl.where(channel == 1, green, blue))


@triton.jit(do_not_specialize=["patches", "columns"])
def unfold_kernel(
    IMAGES, OUT, patches, columns, stride_image, stride_channel, stride_row, stride_column,
    mean_red, mean_green, mean_blue, std_red, std_green, std_blue,
    PATCH: tl.constexpr, BLOCK: tl.constexpr, PATCHES: tl.constexpr,
):  # fmt: skip
    """A program owns PATCHES patches of one image; a row of OUT is a patch, channel by channel, row by row."""
    blocks = tl.cdiv(patches, PATCHES)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    patch = tl.program_id(0) % blocks * PATCHES + tl.arange(0, PATCHES)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    inside = (patch < patches) & (place < 3 * PATCH * PATCH)
    channel = place // (PATCH * PATCH)
    top = patch // columns * PATCH
    left = patch % columns * PATCH
    row = (top + place // PATCH % PATCH).to(tl.int64)
    column = (left + place % PATCH).to(tl.int64)
    at = image * stride_image + channel.to(tl.int64) * stride_channel + row * stride_row + column * stride_column
    x = tl.load(IMAGES + at, mask=inside, other=0).to(tl.float32)
    if IMAGES.dtype.element_ty == tl.uint8:
        x = tl.div_rn(x, 255.0)
    x -= _by_channel(channel, mean_red, mean_green, mean_blue)
    x = tl.div_rn(x, _by_channel(channel, std_red, std_green, std_blue))
    to = (image * patches + patch) * (3 * PATCH * PATCH) + place
    tl.store(OUT + to, x.to(OUT.dtype.element_ty), mask=inside)


def unfold_config(patch: int) -> Config:
    """Patches and numbers of a tile, 32 numbers a thread."""
    block = triton.next_power_of_2(3 * patch * patch)
    return Config(max(1, 4096 // block), block, 4, 1)


def unfold(
    images: Tensor,  # [B, 3, H_px, W_px] uint8, or floats of up to 32 bits that are 1 where uint8 is 255; any strides
    mean: Sequence[float],  # of three channels
    std: Sequence[float],
    patch: int,  # pixels
    out_dtype: torch.dtype,
) -> Tensor:
    """Normalised patches as rows, [B, P, 3 patch^2], row-major.

    Raises: ValueError for shapes and dtypes that the kernel is not made for.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(f"images are [B, 3, H, W] with whole patches of {patch}; got {list(images.shape)}")
    if images.dtype not in (torch.uint8, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"images are uint8, or floats of up to 32 bits; got {images.dtype}")
    batch, _, height, width = images.shape
    rows, columns = height // patch, width // patch
    out = images.new_empty((batch, rows * columns, 3 * patch * patch), dtype=out_dtype)
    if out.numel():
        config = unfold_config(patch)
        launch(
            unfold_kernel, batch * triton.cdiv(rows * columns, config.block_m), config,
            images, out, rows * columns, columns, *images.stride(), *mean, *std,
            PATCH=patch, BLOCK=config.block_n, PATCHES=config.block_m,
        )  # fmt: skip
    return out
