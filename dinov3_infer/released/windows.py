"""Scores of classes in a sliding window, and the class of every pixel."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = ["Colour", "SegmentMap", "check_short_side", "largest", "over_windows", "palette"]

Colour: TypeAlias = tuple[int, int, int]  # red, green, blue in 0 to 255

LONGEST = 2048  # pixels of the long side of an image that is segmented, whatever the short one
_AT_A_TIME = 2**26  # numbers that are enlarged to the size of an image in one go


class SegmentMap(NamedTuple):
    """One image."""

    labels: Tensor  # [H_px, W_px] int64 on the CPU: the class of every pixel
    names: tuple[str, ...]  # of the classes
    colours: tuple[Colour, ...] | None = None  # of the classes, where their data set has some


def check_short_side(size: int, least: int) -> None:
    """Raises: InputError unless `size` is a whole number of pixels from `least`, a patch, to LONGEST."""
    if not isinstance(size, int) or not least <= size <= LONGEST:
        raise InputError(f"size is the short side in pixels, from {least} to {LONGEST}, got {size!r}")


def over_windows(pixels: Tensor, window: int, stride: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Pixels [B, 3, H_px, W_px] -> the mean of scores [B, K, H_px, W_px] where windows overlap.

    `window`, `stride`: pixels of a side.  The last window ends at the border; one that is larger than the image is cut.
    `score`: pixels of a window -> scores [B, K, H, W] of the same height and width.
    """
    total, count = None, pixels.new_zeros(pixels.shape[2:], dtype=torch.float32)
    for top in _starts(pixels.shape[2], window, stride):
        for left in _starts(pixels.shape[3], window, stride):
            here = slice(top, top + window), slice(left, left + window)
            found = score(pixels[:, :, *here])
            if total is None:
                total = found.new_zeros(*found.shape[:2], *pixels.shape[2:])
            total[:, :, *here] += found
            count[here] += 1
    assert total is not None
    return total.div_(count)


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side, in pixels."""
    last = max(length - window, 0)
    return [min(i * stride, last) for i in range(math.ceil(last / stride) + 1)]


def largest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores [K, H, W] -> the class of every pixel at another size, [H_px, W_px] int64; a few classes at a time."""
    best = torch.full(size, -torch.inf).to(scores)
    labels = torch.zeros(size, dtype=torch.int64, device=scores.device)
    step = max(1, _AT_A_TIME // (size[0] * size[1]))
    for start in range(0, len(scores), step):
        some = F.interpolate(scores[None, start : start + step], size=size, mode="bilinear", align_corners=False)
        values, index = some[0].max(dim=0)
        better = values > best
        best, labels = torch.where(better, values, best), torch.where(better, index + start, labels)
    return labels


def palette(count: int) -> tuple[Colour, ...]:
    """Colours that differ, as PASCAL VOC makes them: the bits of a number from 1 on, spread over red, green, blue."""

    def channel(number: int, first: int) -> int:
        return sum(((number >> 3 * step + first) & 1) << 7 - step for step in range(8))

    return tuple((channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(1, count + 1))
