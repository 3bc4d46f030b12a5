"""A small model whose weights come from a formula; it checks the arithmetic of an installation without any file."""

import numpy as np
import torch

from ..backbone import Backbone
from ..model.vit import ViTConfig

__all__ = ["FORMULA", "by_formula"]

FORMULA = "weights by formula"  # the record of `by_formula`


def by_formula() -> Backbone:
    """A small DINOv3 whose weights come from a formula, so that they do not depend on the version of a library."""
    bb = Backbone.from_config(ViTConfig(192, 4, 3, 768))
    start = 0
    with torch.no_grad():
        for name, parameter in sorted(bb.named_parameters()):
            noise = torch.from_numpy(_noise(start, parameter.numel())).view(parameter.shape)
            start += parameter.numel()
            matrix = parameter.ndim > 1 and name.endswith("weight")
            around = 1.0 if name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")) else 0.0
            parameter.copy_(around + noise * (3.0 / parameter[0].numel()) ** 0.5 if matrix else around + 0.3 * noise)
    return bb


def _noise(start: int, count: int) -> np.ndarray:
    """[count] float32 in [-1, 1): the finaliser of MurmurHash3 over the integers from `start` on."""
    h = np.arange(start, start + count, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(8)).astype(np.float32) / np.float32(2**23) - np.float32(1)
