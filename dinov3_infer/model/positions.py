"""Learned positions resized to another grid, by the rule of each implementation."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import one_node

__all__ = ["PositionResize", "cubic_kernel", "resize_positions"]

PositionResize = Literal["offset", "size", "antialias"]


def cubic_kernel(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel of x, of any shape; torch uses a = -0.75, and -0.5 with antialiasing."""
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return torch.where(x <= 1.0, near, torch.where(x < 2.0, far, 0.0))


@one_node
def resize_positions(
    positions: Tensor,  # [1, G*G, C] learned for a square grid of G patches a side
    grid: tuple[int, int],  # h, w in patches
    rule: PositionResize,
    dtype: torch.dtype = torch.float32,  # of the computation
) -> Tensor:
    """Resize learned positions bicubically to another grid, [1, h*w, C].

    Three rules are in use; their features differ by 1 to 4 %.

    offset: Meta's DINO and DINOv2 without registers.  The scale is (h + 0.1)/G, and sampling follows that scale.
    size: transformers' DINO and DINOv2 without registers.  Exactly from G to h.
    antialias: models with registers, and timm.  Exactly from G to h, with a low-pass filter when shrinking.
    """
    side = int(positions.shape[1] ** 0.5)
    if grid == (side, side):
        return positions
    table = positions.to(dtype).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if rule == "offset":
        factors = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        table = F.interpolate(table, scale_factor=factors, mode="bicubic")
    else:
        table = F.interpolate(table, size=grid, mode="bicubic", antialias=rule == "antialias")
    return table.flatten(2).transpose(1, 2).to(positions.dtype)
