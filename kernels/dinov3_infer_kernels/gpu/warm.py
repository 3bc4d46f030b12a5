"""Compiles the forms of the forward pass before they are needed.

A kernel is compiled when its form is first launched, which takes seconds.  A form is a tile and the length of its last,
masked part, which follows from the number of tokens: images of many sizes would meet new forms in the middle of a run.
"""

import torch
from torch import Tensor

from .configs import LEAST, SHORT, TABLE, Config, chip_of, crossover, whole_head
from .forward import forward
from .rotation import rotate
from .short import segments

__all__ = ["forms", "warm"]

Form = tuple[int, Config, bool]  # tokens of an image that takes it, tile, whether images are packed


def forms(device: torch.device, dtype: torch.dtype, width: int, tokens: int | None = None) -> list[Form]:
    """The forms of images with this many tokens, or with any number for None; [] for heads without a kernel."""
    chips = TABLE.get(("forward", width, dtype.itemsize))
    if chips is None:
        return []
    rows, short = chips[chip_of(device)], width == 64 and dtype.itemsize == 2
    if tokens is not None:
        tile = next(config for limit, config in rows if tokens <= limit)
        whole = whole_head(device, tokens) if short else None
        return [(tokens, config, False) for config in (tile, whole) if config is not None]
    found: dict[tuple[object, ...], Form] = {}
    for config in dict.fromkeys(config for _, config in rows):
        found[config, "packed"] = (config.block_n, config, True)
        found[config, 0] = (config.block_n, config, False)
        rest = 16
        while rest <= config.block_n:
            found[config, rest] = (config.block_n + rest - 1, config, False)
            rest *= 2
    last = max((limit for limit, _ in SHORT.get(chip_of(device), ())), default=0) if short else 0
    for count in range(LEAST, last + 1):
        if (whole := whole_head(device, count)) is not None:
            found.setdefault((whole, segments(count)), (count, whole, False))
    return list(found.values())


def warm(
    like: Tensor,  # a tensor of the device, in the dtype of q, k and v
    heads: int,
    width: int,  # D
    tables: torch.dtype | None,  # of cosines and sines; None: no rotation
    tokens: int | None = None,  # of the images to come; None: any number
) -> int:
    """Launches the kernels that the dispatch may choose for these images, each form once, on zeros.  Returns how many.

    Images of one size without a rotation, and those above the crossover, use torch's attention, which is compiled.
    """
    count = 0
    long = tokens is not None and tokens > crossover(like.device, like.dtype, width)
    for number, config, packed in [] if long else forms(like.device, like.dtype, width, tokens):
        if tables is None and not packed:
            continue
        qkv = like.new_zeros(*(() if packed else (1,)), number, 3, heads, width)
        cos, sin = (None, None) if tables is None else like.new_zeros(2, number, width // 2, dtype=tables)
        ends = torch.tensor([0, number], dtype=torch.int32, device=like.device) if packed else None
        forward(qkv, cos, sin, ends, number, width**-0.5, config=config)
        count += 1
    if tables is not None and (tokens is None or long):
        rotate(like.new_zeros(1, 16, 3, heads, width), *like.new_zeros(2, 16, width // 2, dtype=tables))
        count += 1
    return count
