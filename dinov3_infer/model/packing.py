"""Images of several sizes, concatenated to one row of tokens.

Norms, linear layers and activations treat each token alike, so only attention needs the borders of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rope import RopeTable

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """Groups of `count` images with `length` tokens each, in order."""

    groups: tuple[tuple[int, int], ...]  # (count, length)
    device: torch.device

    @property
    def longest(self) -> int:
        """Tokens of the longest image."""
        return max(length for _, length in self.groups)

    def cu_seqlens(self) -> Tensor:
        """The first token of each image and the number of tokens, [S + 1] int32."""
        lengths = [length for count, length in self.groups for _ in range(count)]
        return torch.tensor([0, *lengths], dtype=torch.int64, device=self.device).cumsum(0).to(torch.int32)

    def table(self, tables: Sequence[RopeTable]) -> RopeTable:
        """One RoPE table per group -> one row per token, cos and sin [T, D/2]."""
        cos, sin = (
            torch.cat([table[part].repeat(count, 1) for table, (count, _) in zip(tables, self.groups, strict=True)])
            for part in (0, 1)
        )
        return cos, sin

    def split(self, tokens: Tensor) -> list[Tensor]:  # [T, C]
        """[T, C] -> one view [count, length, C] per group."""
        sizes = [count * length for count, length in self.groups]
        return [part.unflatten(0, group) for part, group in zip(tokens.split(sizes), self.groups, strict=True)]

    def draw(self, drop_path: float, generator: torch.Generator | None) -> tuple[Tensor, "Packing", Tensor]:
        """Draw the images that keep a branch (stochastic depth by batch subset).

        Each group keeps max(1, floor(count (1 - drop_path))) images with the factor count / kept, so that the mean of
        the branch stays the same.

        Returns: The kept token rows [K], their packing, and the factor of each row [K, 1].

        Source: DINOv2 paper (arXiv 2304.07193), section 5; dinov3/layers/block.py at 6876159.
        """
        rows, factors, groups, start = [], [], [], 0
        for count, length in self.groups:
            kept = max(1, int(count * (1.0 - drop_path)))
            chosen = torch.randperm(count, generator=generator, device=generator.device if generator else "cpu")[:kept]
            first = start + chosen.to(self.device) * length
            rows.append((first[:, None] + torch.arange(length, device=self.device)).flatten())
            factors.append(torch.full((kept * length, 1), count / kept, dtype=torch.float64, device=self.device))
            groups.append((kept, length))
            start += count * length
        return torch.cat(rows), Packing(tuple(groups), self.device), torch.cat(factors)
