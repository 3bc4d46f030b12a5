"""Checks of the arguments of a launcher, and the launch itself."""

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .configs import DTYPES, WIDTHS, Config

__all__ = ["LOG2_E", "Shape", "check", "launch", "near", "tail"]

LOG2_E = 1.0 / math.log(2.0)


class Shape(NamedTuple):
    """The shape of a qkv tensor."""

    lead: tuple[int, ...]  # (B, N), or (T,)
    images: int  # B, or S
    tokens: int  # N, or T
    rows: int  # B N, or T
    longest: int
    heads: int
    width: int  # D
    packed: bool
    strides: tuple[int, int, int, int]  # of images (0 for packed), tokens, the three parts, heads

    @property
    def length(self) -> int:
        """Tokens of the mean image: tiles for one large image would be mostly empty for many small ones."""
        return -(-self.rows // max(1, self.images))


def check(
    qkv: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float = 1.0,
    parts: int = 3,
) -> Shape:
    """The shape of the tensors.  Raises ValueError for those that a kernel would read past the end of."""
    if qkv.ndim not in (4, 5) or (qkv.ndim == 5 and cu_seqlens is not None) or qkv.shape[-3] != parts:
        raise ValueError(f"qkv is [B, N, 3, H, D], or [T, 3, H, D] with cu_seqlens; got {list(qkv.shape)}")
    if qkv.dtype not in DTYPES or qkv.shape[-1] not in WIDTHS:
        raise ValueError(f"the kernel takes {DTYPES} and D of {WIDTHS}; got {qkv.dtype} and {qkv.shape[-1]}")
    if qkv.stride(-1) != 1:
        raise ValueError(f"the channels of a head lie side by side, got stride {qkv.stride(-1)}; use qkv.contiguous()")
    *lead, _, heads, width = qkv.shape
    tables = (torch.float32, torch.float16) if qkv.element_size() == 2 else (torch.float32,)
    for table in (cos, sin):
        if table is not None and (
            table.shape != (lead[-1], width // 2) or table.dtype not in tables or not table.is_contiguous()
        ):
            raise ValueError(
                f"cos and sin are contiguous {[lead[-1], width // 2]} in float32, or in float16 where qkv has 16 bits; "
                f"got {list(table.shape)} in {table.dtype}"
            )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together; one of them is None")
    if cos is not None and sin is not None and cos.dtype != sin.dtype:
        raise ValueError(f"cos and sin have one dtype; got {cos.dtype} and {sin.dtype}")
    if cu_seqlens is not None and (
        cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not cu_seqlens.is_contiguous()
    ):
        raise ValueError(f"cu_seqlens is contiguous int32 [S + 1]; got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if scale <= 0.0:
        raise ValueError(f"scale is above 0, got {scale}")
    packed = cu_seqlens is not None
    images = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else math.prod(lead[:-1])
    longest = max_seqlen if packed and max_seqlen is not None else lead[-1]
    return Shape(tuple(lead), images, lead[-1], math.prod(lead), longest, heads, width, packed, _strides(qkv))


def near(qkv: Tensor, shape: Shape) -> tuple[Tensor, Shape]:
    """qkv, or a contiguous copy if its tokens lie too far apart for the int32 offsets of the kernels.

    Raises: ValueError for an image whose contiguous copy is too long for them as well.
    """
    if shape.longest * 3 * shape.heads * shape.width >= 2**31:
        raise ValueError(
            f"an image of {shape.longest} tokens with {shape.heads} heads of {shape.width} channels is beyond the "
            "kernel's offsets of 32 bits; use attn_implementation='sdpa'"
        )
    if (shape.longest - 1) * shape.strides[1] + shape.width < 2**31:
        return qkv, shape
    qkv = qkv.contiguous()
    return qkv, shape._replace(strides=_strides(qkv))


def _strides(qkv: Tensor) -> tuple[int, int, int, int]:
    stride = qkv.stride()
    return 0 if qkv.ndim == 4 else stride[0], stride[-4], stride[-3], stride[-2]


def tail(shape: Shape, block: int) -> int:
    """Keys of the last, masked tile: 0 if whole tiles fit, else the next power of two; BLOCK_N for packed images."""
    if shape.packed:
        return block
    rest = shape.tokens % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def launch(kernel: Any, programs: int, config: Config, *arguments: Any, **constants: Any) -> None:
    """Starts a kernel on the device of its tensors, which need not be the current one."""
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    on_device = nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
    with on_device:
        kernel[(programs,)](*arguments, **constants, **config.options())
