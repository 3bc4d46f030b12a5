"""The graph of an export: normalised pixels in, named tokens out.

For one size the position tables are constants.  For any size they are computed from the size of the input, learned
positions too, in elementary operations and without control flow.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..model.network import BackboneOutput, Network
from ..model.positions import PositionResize, cubic_kernel
from ..model.vit import VisionTransformer

__all__ = ["INPUT", "Dynamic", "Tokens", "bicubic", "export_copy", "graph_of", "program"]

Dynamic = Literal["batch"] | bool
Tokens = dict[str, Tensor]
INPUT = "pixel_values"
_EXAMPLE = (5, 7)  # patches of the traced input if the size is free; no dimension equals another one


def export_copy(model: Network) -> Network:
    """A copy to change: on the CPU, in eval mode, with attention in plain torch; tensors on the CPU are shared."""
    shared: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        there = tensor.detach().cpu()
        shared[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    found = deepcopy(model, shared).eval()
    if isinstance(found, VisionTransformer):
        found.set_attention("sdpa")
    return found


def graph_of(model: Network, grid: tuple[int, int] | None) -> "Graph":
    """The graph of a model; `grid` is (h, w) in patches, None for any size."""
    return TransformerGraph(model, grid) if isinstance(model, VisionTransformer) else Graph(model, grid)


class Graph(nn.Module):
    """Normalised pixels in, named tokens out."""

    def __init__(self, model: Network, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.model, self.any_size = model, grid is None

    def forward(self, pixel_values: Tensor) -> Tokens:
        """[B, 3, H_px, W_px] -> "cls_token" [B, C], "register_tokens" [B, R, C] if R > 0, "patch_tokens" [B, P, C]."""
        if self.any_size:  # folding and unfolding: a size that is not whole patches fails, and is not cropped silently
            b, _, height, width = pixel_values.shape
            p = self.model.patch_size
            folded = pixel_values.reshape(b, 3, height // p, p, width // p, p)
            pixel_values = folded.reshape(b, 3, height // p * p, width // p * p)
        named = dict(zip(("cls_token", "register_tokens", "patch_tokens"), self.tokens(pixel_values), strict=True))
        if not self.model.num_register_tokens:
            del named["register_tokens"]
        return named

    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H_px, W_px] -> class token [B, C], registers [B, R, C], patches [B, P, C]."""
        output: BackboneOutput = self.model(pixels, layers=[])
        return output[:3]


class TransformerGraph(Graph):
    """A graph with position tables as constants, or computed from the size of the input."""

    model: VisionTransformer
    resized: Tensor | None  # [1, P, C]
    cos: Tensor | None  # [N, D/2]
    sin: Tensor | None

    def __init__(self, model: VisionTransformer, grid: tuple[int, int] | None) -> None:
        super().__init__(model, grid)
        positions, rope = None, None
        if grid is not None and model.pos_embed is not None:
            positions = model.positions(grid, torch.promote_types(model.pos_embed.dtype, torch.float32))
        elif grid is not None:
            rope = model.rope(grid)
        self.register_buffer("resized", positions)
        self.register_buffer("cos", None if rope is None else rope[0])
        self.register_buffer("sin", None if rope is None else rope[1])

    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H_px, W_px] -> class token [B, C], registers [B, R, C], patches [B, P, C]."""
        model, rope = self.model, None if self.cos is None or self.sin is None else (self.cos, self.sin)
        positions = self.resized
        if self.any_size and model.pos_embed is not None:
            positions = self._any_positions(model.grid_of(pixels))
        return model.split(model.normed(model.run_blocks(pixels, positions=positions, rope=rope)[0]))

    def _any_positions(self, grid: tuple[int, int]) -> Tensor:
        """`resize_positions` as two matrix products, [1, h*w, C]."""
        config, table = self.model.config, self.model.pos_embed
        assert table is not None and config.position_grid is not None
        side = config.position_grid
        rows, columns = bicubic(side, grid, config.position_resize)
        square = table[0, 1:].to(rows.dtype).unflatten(0, (side, side))  # [G, G, C]
        found: Tensor = (columns @ (rows @ square.flatten(1)).unflatten(1, (side, -1))).flatten(0, 1)
        return found[None].to(table.dtype)


def bicubic(side: int, grid: tuple[int, int], rule: PositionResize) -> tuple[Tensor, Tensor]:
    """Weights of torch's bicubic resizing as matrices: [h, G] for rows and [w, G] for columns.

    The table's own grid stays unchanged; the rule "offset" alone would change it.
    """
    lengths = [torch.ones(n).sum() for n in grid]  # tensors, since comparing sizes would specialise the graph
    own = (lengths[0] == side) & (lengths[1] == side)
    extra = torch.where(own, 0.0, 0.1) if rule == "offset" else 0.0
    found = []
    for n, length in zip(grid, lengths, strict=True):
        scale = side / (length + extra)
        centres = scale * (torch.arange(n, dtype=torch.float32) + 0.5)[:, None]  # in the table, [n, 1]
        cells = torch.arange(side, dtype=torch.float32)
        if rule == "antialias":
            weights = cubic_kernel((cells + 0.5 - centres) / scale.clamp(min=1.0), -0.5)
            found.append(weights / weights.sum(dim=1, keepdim=True))
            continue
        first = (centres - 0.5).floor()
        taps = first + torch.arange(-1.0, 3.0)  # [n, 4]
        weights = cubic_kernel(centres - 0.5 - taps, -0.75)
        hit = taps.clamp(0.0, side - 1.0)[:, :, None] == cells  # [n, 4, G]; taps beyond the edge use the edge
        found.append((weights[:, :, None] * hit).sum(dim=1))
    return found[0], found[1]


def program(graph: Graph, grid: tuple[int, int], dynamic: Dynamic) -> Any:
    """The graph as an ExportedProgram of torch.export."""
    patch = graph.model.patch_size
    h, w = _EXAMPLE if dynamic is True else grid
    example = torch.zeros(2 if dynamic else 1, getattr(graph.model.config, "in_chans", 3), h * patch, w * patch)
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)} if dynamic else {}
    if dynamic is True:
        free |= {2: patch * torch.export.Dim("h", min=2), 3: patch * torch.export.Dim("w", min=2)}
    # with gradients enabled torch takes the operators that compilers know by name; nothing here needs a gradient
    with torch.enable_grad():
        return torch.export.export(graph, (example,), dynamic_shapes={INPUT: free}, strict=False)
