"""Vectors that were recorded, to tell whether weights and arithmetic are what they should be.

The pictures are parts of Chelsea the cat by Stefan van der Walt and of a cup of coffee by Rachel Michetti, both CC0,
and of a rocket by SpaceX, in the public domain.  They have 112 pixels a side, whole patches of 8, 14 and 16, so that
nothing is resized.  tests/support/make_golden.py wrote them and the vectors.
"""

import json
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..backbone import Backbone
from ..images.preprocess import Preprocess
from ..model.vit import ViTConfig
from ..zoo import MODELS

__all__ = ["FORMULA", "PICTURES", "Known", "by_formula", "compute", "difference", "known"]

_DATA = Path(__file__).parent.parent / "data" / "samples"
PICTURES = [_DATA / f"{name}.png" for name in ("cat", "coffee", "rocket")]
SIDE = 112  # pixels
FORMULA = "weights by formula"  # the record of `by_formula`


@dataclass(frozen=True)
class Known:
    """Weights that were seen."""

    what: str  # in words
    model: str  # name of the zoo, "" for none
    fingerprint: str
    vectors: Tensor  # [3, 2C] float32, as `compute` gives


def known(file: Path = _DATA / "golden.safetensors") -> list[Known]:
    with safe_open(file, framework="pt") as content:
        records = json.loads(content.metadata()["records"])
        return [Known(**record, vectors=content.get_tensor(record["fingerprint"])) for record in records]


def compute(bb: Backbone) -> Tensor:
    """Class token and mean of the patches of the three pictures, [3, 2C] float32.

    The same for the same weights in every layout: pixels are normalised by ImageNet's mean and std, and positions are
    resized by one rule.
    """
    first = next(iter(MODELS.values()))
    same = copy(bb)  # with the parameters of `bb`, and settings of its own
    same.preprocess = Preprocess(first.mean, first.std, bb.patch_size, SIDE)
    if isinstance(bb.config, ViTConfig):
        same.config = replace(bb.config, position_resize="antialias")
    return same.extract_features(PICTURES, pooling="cls_mean").embedding.cpu()


def difference(found: Tensor, recorded: Tensor) -> float:
    """Largest distance of a vector from its record, over the length of the record."""
    return float(((found - recorded).norm(dim=-1) / recorded.norm(dim=-1)).max())


def by_formula() -> Backbone:
    """A small DINOv3 whose weights are a formula, the same in every version of every library."""
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
    """[count] float32 in [-1, 1): the finaliser of MurmurHash3 over whole numbers from `start` on."""
    h = np.arange(start, start + count, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(8)).astype(np.float32) / np.float32(2**23) - np.float32(1)
