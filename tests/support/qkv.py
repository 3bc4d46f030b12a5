"""Helpers for the tests of attention and its kernels: rotations, lengths, and memory that is filled with NaN."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov3_infer.model.rope import rope_periods, rope_table

__all__ = ["GRIDS", "PREFIX", "angles", "grid_table", "offsets", "poison", "rms"]

PREFIX = 5  # class token and four registers
GRIDS = {6: (1, 1), 41: (4, 9), 68: (7, 9), 201: (7, 28), 261: (8, 32), 1029: (16, 64)}  # grids h x w, not square


def angles(count: int, head_dim: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Random rotations, [N, D/2] each, with identity rows at the front."""
    angle = torch.rand(count, head_dim // 2) * 6 - 3
    angle[:prefix] = 0
    return angle.cos(), angle.sin()


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)


def grid_table(grids: list[tuple[int, int]], width: int) -> tuple[Tensor, Tensor]:
    """The concatenated RoPE tables of images with these grids, [T, D/2] each."""
    tables = [rope_table(grid, rope_periods(width), PREFIX) for grid in grids]
    return torch.cat([cos for cos, _ in tables]), torch.cat([sin for _, sin in tables])


def rms(x: Tensor) -> float:
    return float(x.detach().double().pow(2).mean().sqrt())


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that an unwritten value cannot be right by chance."""

    def poisoned(create: Any) -> Any:
        def filled(*arguments: Any, **options: Any) -> Tensor:
            made = create(*arguments, **options)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return filled

    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
