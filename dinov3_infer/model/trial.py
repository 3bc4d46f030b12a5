"""Compares a plan with the model's own code before its numbers are used."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import sdpa_attention
from .network import BackboneOutput, Scale, normalised
from .vit import VisionTransformer

__all__ = ["LEAST", "Precision", "Undecided", "compare", "twin", "why_not_trusted"]

LEAST = {"exact": (0.999, 0.998), "fast": (0.999, 0.998)}  # cosines: mean of class tokens, 1st percentile of patches

Run = Callable[[Sequence[Tensor]], Sequence[BackboneOutput]]


class Undecided(Exception):
    """The model's own result is not finite, so that it cannot judge the plan."""


class Precision(NamedTuple):
    """Cosine similarity with the features of plain float32."""

    cls_mean: float
    cls_worst: float
    patch_percentile: float  # 99 % of the patches are nearer
    patch_worst: float


def compare(found: BackboneOutput, plain: BackboneOutput) -> Precision:
    """Cosines of tokens with those of the plain model."""
    pairs = ((found.cls_token, plain.cls_token), (found.patch_tokens, plain.patch_tokens))
    cls, patches = (F.cosine_similarity(a.double(), b.double(), dim=-1).flatten().sort().values for a, b in pairs)
    return Precision(cls.mean().item(), cls[0].item(), patches[len(patches) // 100].item(), patches[0].item())


def twin(model: VisionTransformer) -> VisionTransformer:
    """A copy that shares the parameters and uses torch's own attention."""
    found = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    found.set_attention(sdpa_attention)
    return found


def why_not_trusted(
    run: Run,  # the plan, or the model on a GPU
    judge: VisionTransformer,  # computes the right result by torch's own operators
    images: Sequence[Tensor],  # [B, 3, H_px, W_px] each, uint8 or normalised
    scale: Scale,
    mode: str,
    passes: int = 3,  # the second may record a graph, which the third replays
) -> str | None:
    """Why the results of `run` are not used, or None if they are right.

    They need the cosines that the mode promises.  Where the judge itself is further than that from float32, they may be
    twice as far from the judge as it is from float32.

    Raises: Undecided; torch.OutOfMemoryError, which says nothing about the numbers.
    """
    pixels = [normalised(t, scale) for t in images]
    expected = [judge(t) for t in pixels]
    if not all(bool(t.isfinite().all()) for output in expected for t in output[:3]):
        raise Undecided
    try:
        for _ in range(passes):
            found = run(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"it raised {type(error).__name__}: {lines[0][:160]}"
    least = LEAST[mode]
    for ours, theirs, given in zip(found, expected, pixels, strict=True):
        near = compare(ours, theirs)
        if near.cls_mean >= least[0] and near.patch_percentile >= least[1]:
            continue
        own = _rounding(judge, given, theirs)
        if near.cls_mean >= 1 - 2 * (1 - own.cls_mean) and near.patch_percentile >= 1 - 2 * (1 - own.patch_percentile):
            continue
        return (
            f"its class tokens have a cosine of {near.cls_mean:.4f} with those of the model without it, "
            f"patches {near.patch_percentile:.4f}"
        )
    return None


def _rounding(judge: VisionTransformer, pixels: Tensor, found: BackboneOutput) -> Precision:
    """Cosines of the judge with its own results in float32; 1 if it has no float32 weights to compute them with."""
    if judge.main_weight.dtype != torch.float32:
        return Precision(1.0, 1.0, 1.0, 1.0)
    with torch.autocast(pixels.device.type, enabled=False):
        return compare(found, judge(pixels))
