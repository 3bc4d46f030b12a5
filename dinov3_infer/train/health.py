"""Health checks of a run: measures of the moving average on a fixed set of images, and a verdict.

Source: RankMe (arXiv 2210.02885); the weighted 20-NN of DINO (arXiv 2104.14294), appendix C.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbone import Backbone
from ..errors import Dinov3Error, ImageError, InputError, MissingFileError
from ..tasks.probes import nearest, weighted_votes
from .config import TrainConfig
from .datasets import Data
from .draws import generator

__all__ = ["Health", "TrainingStopped", "knn_accuracy", "rank_me", "spread_of"]

Verdict = Literal["healthy", "collapsing", "forgetting"]

_DRIFT_IMAGES = 32


class TrainingStopped(Dinov3Error, RuntimeError):
    """The run diverged or collapsed and was ended; its folder holds the last good weights."""


def rank_me(features: Tensor) -> float:
    """Effective number of dimensions of features [n, C]: exp of the entropy of the normalised singular values.

    Source: RankMe (arXiv 2210.02885).
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum().exp())


def spread_of(features: Tensor) -> float:
    """1 minus the mean cosine between two images of features [n, C]; 0 if all images have the same features."""
    unit = F.normalize(features.double(), dim=-1)
    n = len(unit)
    return float(1.0 - (unit.sum(0).square().sum() - n) / (n * (n - 1)))


def knn_accuracy(features: Tensor, labels: Tensor, neighbours: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of a weighted nearest-neighbour vote, in which each image is classified by the others.

    Args:
        features: [n, C].
        labels: [n] int64, classes from 0.
        neighbours: number of neighbours that vote.
        temperature: of the weights exp(cosine / temperature).

    Returns:
        A share from 0 to 1.

    Source: DINO (arXiv 2104.14294), appendix C.
    """
    cosines, rows = nearest(features, features, min(neighbours + 1, len(features)))
    itself = rows == torch.arange(len(rows), device=rows.device)[:, None]
    labels = labels.to(rows.device)
    votes = weighted_votes(cosines.masked_fill(itself, -math.inf), labels[rows], int(labels.max()) + 1, temperature)
    return float((votes.argmax(-1) == labels).double().mean())


class Health:
    """Checks the same images every time, and compares with the first check, which is before the first step.

    Args:
        config: settings of the run.
        data: images to choose from.
        backbone: the model before the first step.

    Raises:
        InputError: fewer than two of the chosen images can be read.
    """

    def __init__(self, config: TrainConfig, data: Data, backbone: Backbone) -> None:
        self.config = config
        count = min(config.health_pictures, len(data))
        chosen = torch.randperm(len(data), generator=generator(config.seed, 0, "health"), device="cpu")[:count].tolist()
        reasons = {i: _why_unreadable(data, i) for i in chosen}
        self.images = [i for i, reason in reasons.items() if reason is None]
        if len(self.images) < 2:
            raise InputError(
                f"{len(self.images)} of {count} images tried can be read, and training needs 2; check the data: "
                f"{next(filter(None, reasons.values()), 'there are no more images')}"
            )
        self.data = data
        self.labels = None if data.labels is None else data.labels[self.images]
        self.similarities: Tensor | None = None
        self.first = self.look(backbone)

    def look(self, backbone: Backbone) -> dict[str, float]:
        """The measures of a model: spread, RankMe, patch drift, and 20-NN accuracy if the images have labels."""
        cls, maps = self._features(backbone)
        found = {"rank_me": rank_me(cls), "spread": spread_of(cls)}
        if self.labels is not None:
            found["knn"] = knn_accuracy(cls, self.labels)
        if self.similarities is None:
            self.similarities = maps
        found["patch_drift"] = float((maps - self.similarities).abs().mean())
        return found

    def judge(self, found: dict[str, float], step: int) -> tuple[Verdict, str]:
        """A verdict on measures of `look`, and a sentence that explains it."""
        first, started = self.first, not self.config.from_scratch
        young = not started and step < 0.25 * self.config.steps  # random weights look collapsed
        least = (0.1 * first["spread"], 0.1 * first["rank_me"]) if started else (0.005, 1.5)
        if (found["spread"] < least[0] or found["rank_me"] < least[1]) and not young:
            return "collapsing", (
                f"all images have nearly the same features (spread {found['spread']:.3f}, RankMe "
                f"{found['rank_me']:.1f}); lower lr_at_1024, raise koleo_weight or batch_size"
            )
        if found.get("teacher_entropy", 0.0) > 0.995 and step >= 0.25 * self.config.steps:
            return "collapsing", (
                f"the heads do not separate images (the entropy of the targets is {found['teacher_entropy']:.4f} of "
                "its maximum); raise head_lr, or lower teacher_temperature"
            )
        if started and "knn" in found and found["knn"] < first["knn"] - 0.1:
            return "forgetting", (
                f"20-NN fell from {first['knn']:.2f} to {found['knn']:.2f}; lower lr_at_1024, or tune='last' or 'lora'"
            )
        if started and found["patch_drift"] > 0.25:
            return "forgetting", (
                f"similarities between patches changed by {found['patch_drift']:.2f} on average; use gram='start'"
            )
        return "healthy", f"spread {found['spread']:.3f}, RankMe {found['rank_me']:.1f}"

    @torch.no_grad()
    def _features(self, backbone: Backbone) -> tuple[Tensor, Tensor]:
        """Class tokens [n, C], and cosines between the patches of the first images, [m, P, P]."""
        device, dtype = backbone.main_weight.device, backbone.main_weight.dtype
        transform = backbone.preprocess.with_options(self._side(backbone), "squash")
        tokens: list[Tensor] = []
        maps: list[Tensor] = []
        for start in range(0, len(self.images), 32):
            images = [self.data.read(i) for i in self.images[start : start + 32]]
            out = backbone(transform.batch(images).pixels.to(device, dtype))
            tokens.append(out.cls_token)
            if start < _DRIFT_IMAGES:
                patches = F.normalize(out.patch_tokens.float(), dim=-1)
                maps.append(patches @ patches.mT)
        return torch.cat(tokens), torch.cat(maps)

    def _side(self, backbone: Backbone) -> int:
        return max(1, round(self.config.global_px / backbone.patch_size)) * backbone.patch_size


def _why_unreadable(data: Data, index: int) -> str | None:
    try:
        data.read(index)
    except (ImageError, MissingFileError) as error:
        return str(error)
    return None
