"""Axial 2D rotary position embedding: patch coordinates, and the rotation angle of each channel pair.

Half of the channel pairs rotate with the row of a patch, half with its column.  Tables are always float32: in bfloat16
grids of more than 128 patches per side would share angles.  Class and register tokens get identity rows (cos 1, sin 0),
so that code that applies a table needs no special case for them.

Source: DINOv3 paper (arXiv 2508.10104), section 3.2; dinov3/layers/rope_position_encoding.py and
dinov3/layers/attention.py at 6876159.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .tracing import one_node

__all__ = ["RopeAugmentation", "RopeTable", "apply_rope", "rope_coordinates", "rope_periods", "rope_table"]

RopeTable = tuple[Tensor, Tensor]  # cos, sin: [N, D/2] float32 each


@dataclass(frozen=True)
class RopeAugmentation:
    """Random changes of the patch coordinates in training, in this order; None skips a step.

    shift s: each axis moves by a draw from U(-s, s).
    jitter j: each axis is scaled by a log-uniform draw from [1/j, j].
    rescale r: both axes are scaled by one log-uniform draw from [1/r, r].  The released models used 2 and no other
    step.

    Raises: InputError for a negative shift, and for a jitter or rescale below 1.
    """

    shift: float | None = None
    jitter: float | None = None
    rescale: float | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and not self.shift >= 0:
            raise InputError(f"rope shift is the end of a range [-s, s], got {self.shift}; give a value of at least 0")
        for name in ("jitter", "rescale"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise InputError(
                    f"rope {name} is the upper end of a range [1/x, x], got {value}; give a value of at least 1"
                )


def rope_periods(
    head_dim: int,  # D
    base: float = 100.0,
) -> Tensor:
    """Wavelengths of the rotation, [D/4] float32, in units of the normalised coordinates: base^(4i/D)."""
    exponents = torch.arange(head_dim // 4, dtype=torch.float32, device="cpu") * (4.0 / head_dim)
    return base**exponents


def rope_coordinates(
    grid: tuple[int, int],  # h, w in patches
    device: torch.device | None = None,
) -> Tensor:
    """Patch centres as (row, column), [P, 2] float32, row-major.

    Each axis runs over [-1, 1] by its own length, so the first of h rows is at 1/h - 1.
    """
    rows, columns = ((2.0 * torch.arange(n, dtype=torch.float32, device=device) + 1.0) / n - 1.0 for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def augment_coordinates(
    coordinates: Tensor,  # [P, 2]
    augmentation: RopeAugmentation,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shift and scale patch coordinates [P, 2] at random; all patches share one draw."""

    def uniform(count: int, limit: float) -> Tensor:  # [count] in [-limit, limit]
        device = generator.device if generator else "cpu"
        draw = torch.rand(count, generator=generator, dtype=torch.float32, device=device)
        return ((2.0 * draw - 1.0) * limit).to(coordinates.device)

    if augmentation.shift is not None:
        coordinates = coordinates + uniform(2, augmentation.shift)
    if augmentation.jitter is not None:
        coordinates = coordinates * uniform(2, math.log(augmentation.jitter)).exp()
    if augmentation.rescale is not None:
        coordinates = coordinates * uniform(1, math.log(augmentation.rescale)).exp()
    return coordinates


@one_node
def rope_table(
    grid: tuple[int, int],  # h, w in patches
    periods: Tensor,  # [D/4] float32
    num_prefix: int = 0,  # 1 + R tokens before the patches
    augmentation: RopeAugmentation | None = None,
    generator: torch.Generator | None = None,
) -> RopeTable:
    """cos and sin of the angle of every channel pair, [N, D/2] float32 each.

    Pairs 0 .. D/4-1 rotate by 2 pi row / period, the others by 2 pi column / period; pair k is channels k and k + D/2.
    """
    coordinates = rope_coordinates(grid, periods.device)
    if augmentation is not None:
        coordinates = augment_coordinates(coordinates, augmentation, generator)
    angles = (2.0 * math.pi * coordinates[:, :, None] / periods).flatten(1)  # [P, 2, D/4] -> [P, D/2]
    angles = torch.nn.functional.pad(angles, (0, 0, num_prefix, 0))  # angle 0 is the identity
    return angles.cos(), angles.sin()


def apply_rope(
    x: Tensor,  # [..., N, H, D]
    cos: Tensor,  # [N, D/2] float32, or float16 for x of 16 bits
    sin: Tensor,  # [N, D/2], likewise
) -> Tensor:
    """Rotate every token of every head, [..., N, H, D] in the dtype of x; computed in float32 at least."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    first, second = x.to(wide).chunk(2, dim=-1)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
