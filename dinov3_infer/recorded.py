"""Vectors that were recorded, to tell whether weights and arithmetic are what they should be.

The images are parts of Chelsea the cat by Stefan van der Walt and of a cup of coffee by Rachel Michetti, both CC0,
and of a rocket by SpaceX, in the public domain.  They have 112 pixels a side, whole patches of 8, 14 and 16, so that
nothing is resized.  tests/support/make_golden.py wrote them and the vectors.
"""

import json
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import Dinov3Error
from .images.preprocess import Preprocess
from .zoo import MODELS

__all__ = ["PICTURES", "SIDE", "Known", "compute", "difference", "known", "why_not"]

_DATA = Path(__file__).parent / "data" / "samples"
PICTURES = [_DATA / f"{name}.png" for name in ("cat", "coffee", "rocket")]
SIDE = 112  # pixels


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


def compute(bb: Any) -> Tensor:
    """Class token and mean of the patches of the three images, [3, 2C] float32, of a Backbone.

    The same for the same weights in every layout: pixels are normalised by ImageNet's mean and std, and positions are
    resized by one rule.
    """
    first = next(iter(MODELS.values()))
    same = copy(bb)  # with the parameters of `bb`, and settings of its own
    same.preprocess = Preprocess(first.mean, first.std, bb.patch_size, SIDE)
    if bb.config.position_grid is not None:
        same.config = replace(bb.config, position_resize="antialias")
    found: Tensor = same.extract_features(PICTURES, pooling="cls_mean").embedding.cpu()
    return found


def difference(found: Tensor, recorded: Tensor) -> float:
    """Largest distance of a vector from its record, over the length of the record."""
    return float(((found - recorded).norm(dim=-1) / recorded.norm(dim=-1)).max())


def why_not(bb: Any, device: torch.device, close: float = 1e-3) -> str | None:
    """Why a device must not be used, or None: it gives other features of a recorded model, or raises.

    `close`: relative distance.  Float32 on other hardware is about 1e-5 away, wrong kernels far more.
    """
    (record,) = (one.vectors for one in known() if one.fingerprint == bb.fingerprint())
    try:
        distance = difference(compute(bb.to(device)), record)
    except (Dinov3Error, RuntimeError, TypeError) as error:  # what torch raises for an operator that it lacks
        return f"{type(error).__name__} in a trial: {str(error).splitlines()[0]}"
    return None if distance <= close else f"its features are {distance:.1e} away from the recorded ones"
