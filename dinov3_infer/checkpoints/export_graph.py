"""What an export holds: a graph that takes normalised pixels and gives named tokens.

For one size the tables of positions are constants; for any size they are computed from that of the input, in elementary
operations and without control flow, learned ones too.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..model.layers import PositionResize
from ..model.vit import VisionTransformer

__all__ = ["INPUT", "Dynamic", "Tokens", "Traced", "bicubic", "program", "twin"]

Dynamic = Literal["batch"] | bool
Tokens = dict[str, Tensor]
INPUT = "pixel_values"
_EXAMPLE = (5, 7)  # patches of what is traced where the size is free: no number of it is special


def twin(model: VisionTransformer) -> VisionTransformer:
    """A copy to change, on the CPU, in eval mode, with attention in plain torch; tensors on the CPU are shared."""
    shared: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().cpu()
        shared[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    found = deepcopy(model, shared).eval()
    found.set_attention("sdpa")
    return found


class Traced(nn.Module):
    """Normalised pixels in, named tokens out.  The model asks this one for its tables of positions."""

    def __init__(self, model: VisionTransformer, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.model = model
        self.any_size = grid is None
        if grid is None:
            model.positions = self._any_positions  # type: ignore[method-assign]
        elif model.pos_embed is not None:
            stream = torch.promote_types(model.pos_embed.dtype, torch.float32)
            self.register_buffer("resized", model.positions(grid, stream))
            model.positions = lambda grid, dtype: self.resized  # type: ignore
        else:
            for name, table in zip(("cos", "sin"), model.rope(grid) or (), strict=True):
                self.register_buffer(name, table)
            model.rope = lambda grid: (self.cos, self.sin)  # type: ignore

    def forward(self, pixel_values: Tensor) -> Tokens:
        if self.any_size:  # folded and unfolded: a size of no whole patches fails here, and is not cut off in silence
            b, _, height, width = pixel_values.shape
            p = self.model.patch_size
            folded = pixel_values.reshape(b, 3, height // p, p, width // p, p)
            pixel_values = folded.reshape(b, 3, height // p * p, width // p * p)
        tokens = self.model.split(self.model.normed(self.model.run_blocks(pixel_values)[0]))
        named = dict(zip(("cls_token", "register_tokens", "patch_tokens"), tokens, strict=True))
        if not self.model.num_register_tokens:
            del named["register_tokens"]
        return named

    def _any_positions(self, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """`layers.resize_positions` as two products, [1, h*w, C]."""
        config, table = self.model.config, self.model.pos_embed
        assert table is not None and config.position_grid is not None
        side = config.position_grid
        rows, columns = bicubic(side, grid, config.position_resize)
        square = table[0, 1:].to(rows.dtype).unflatten(0, (side, side))  # [G, G, C]
        found: Tensor = (columns @ (rows @ square.flatten(1)).unflatten(1, (side, -1))).flatten(0, 1)
        return found[None].to(table.dtype)


def bicubic(side: int, grid: tuple[int, int], rule: PositionResize) -> tuple[Tensor, Tensor]:
    """The weights of G rows in each of h, [h, G], and of G columns in each of w, [w, G], as torch's resizing has them.

    The table's own grid is left as it is, which "offset" would not do by itself.
    """
    lengths = [torch.ones(n).sum() for n in grid]  # as tensors: comparing sizes would fix them
    own = (lengths[0] == side) & (lengths[1] == side)
    extra = torch.where(own, 0.0, 0.1) if rule == "offset" else 0.0
    found = []
    for n, length in zip(grid, lengths, strict=True):
        scale = side / (length + extra)
        centres = scale * (torch.arange(n, dtype=torch.float32) + 0.5)[:, None]  # in the table, [n, 1]
        cells = torch.arange(side, dtype=torch.float32)
        if rule == "antialias":
            weights = _cubic((cells + 0.5 - centres) / scale.clamp(min=1.0), -0.5)
            found.append(weights / weights.sum(dim=1, keepdim=True))
            continue
        first = (centres - 0.5).floor()
        taps = first + torch.arange(-1.0, 3.0)  # [n, 4]
        weights = _cubic(centres - 0.5 - taps, -0.75)
        hit = taps.clamp(0.0, side - 1.0)[:, :, None] == cells  # [n, 4, G]: those beyond the edge count for the edge
        found.append((weights[:, :, None] * hit).sum(dim=1))
    return found[0], found[1]


def _cubic(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel; torch takes a = -0.75, and -0.5 where it filters."""
    x = x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return torch.where(x <= 1.0, near, torch.where(x < 2.0, far, 0.0))


def program(traced: Traced, grid: tuple[int, int], dynamic: Dynamic) -> Any:
    """The graph, as torch.export has it."""
    patch = traced.model.patch_size
    h, w = _EXAMPLE if dynamic is True else grid
    example = torch.zeros(2 if dynamic else 1, 3, h * patch, w * patch)
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)} if dynamic else {}
    if dynamic is True:
        free |= {2: patch * torch.export.Dim("h", min=2), 3: patch * torch.export.Dim("w", min=2)}
    # with gradients enabled, where the forms that compilers know by name are taken; there is nothing to differentiate
    with torch.enable_grad():
        return torch.export.export(traced, (example,), dynamic_shapes={INPUT: free}, strict=False)
