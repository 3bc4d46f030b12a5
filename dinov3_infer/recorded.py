"""Recorded vectors of three images, which show whether weights and arithmetic are right.

The images are crops of Chelsea the cat by Stefan van der Walt and of a cup of coffee by Rachel Michetti, both CC0, and
of a rocket by SpaceX, in the public domain.  Their side is 112 pixels, whole patches of 8, 14 and 16, so that nothing
is resized.  tests/support/make_golden.py writes them and the vectors.
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

__all__ = ["IMAGES", "SIDE", "Known", "compute", "difference", "known", "why_not"]

_DATA = Path(__file__).parent / "data" / "samples"
IMAGES = [_DATA / f"{name}.png" for name in ("cat", "coffee", "rocket")]
SIDE = 112  # pixels


@dataclass(frozen=True)
class Known:
    """Weights with recorded vectors."""

    what: str  # description of the weights
    model: str  # name in the model table, or ""
    fingerprint: str
    vectors: Tensor  # [3, 2C] float32, from `compute`


def known(file: Path = _DATA / "golden.safetensors") -> list[Known]:
    """The records in a file."""
    with safe_open(file, framework="pt") as content:
        records = json.loads(content.metadata()["records"])
        return [Known(**record, vectors=content.get_tensor(record["fingerprint"])) for record in records]


def compute(bb: Any) -> Tensor:
    """Class token and mean of the patches of the three images, [3, 2C] float32, computed by a Backbone.

    The result does not depend on the layout of the checkpoint: pixels are normalised by ImageNet's mean and standard
    deviation, and position embeddings are resized by one rule.
    """
    first = next(iter(MODELS.values()))
    same = copy(bb)  # shares the parameters of `bb`, so that only its settings change
    same.preprocess = Preprocess(first.mean, first.std, bb.patch_size, SIDE)
    if bb.config.position_grid is not None:
        same.config = replace(bb.config, position_resize="antialias")
    found: Tensor = same.extract_features(IMAGES, pooling="cls_mean").embedding.cpu()
    return found


def difference(found: Tensor, recorded: Tensor) -> float:
    """The largest distance between a vector and its record, both [3, 2C], relative to the length of the record."""
    return float(((found - recorded).norm(dim=-1) / recorded.norm(dim=-1)).max())


def why_not(bb: Any, device: torch.device, close: float = 1e-3) -> str | None:
    """The reason not to use a device, or None: it raises an error, or gives other features than recorded.

    `close`: allowed relative distance.  Float32 on other hardware differs by about 1e-5, wrong kernels by far more.
    """
    (record,) = (one.vectors for one in known() if one.fingerprint == bb.fingerprint())
    try:
        distance = difference(compute(bb.to(device)), record)
    except (Dinov3Error, RuntimeError, TypeError) as error:  # torch raises these for operators that a device lacks
        return f"{type(error).__name__} in a trial: {str(error).splitlines()[0]}"
    return None if distance <= close else f"its features are {distance:.1e} away from the recorded ones"
