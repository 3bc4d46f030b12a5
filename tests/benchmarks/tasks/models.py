"""The real weights, and their baselines: the same architecture with random weights, and plain pixels."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import sets  # puts tests/ on the path
import torch
import torch.nn.functional as F

from dinov3_infer import Backbone, Features, LayerFeatures
from dinov3_infer.images.decode import ImageLike
from dinov3_infer.images.opening import each_image

__all__ = ["MODELS", "Pixels", "model_of"]

MODELS = ("real", "random", "pixels")


@cache
def real() -> Backbone:
    with tempfile.TemporaryDirectory() as folder:
        return Backbone.from_pretrained(sets.fetch.write_dinov2_vits14(Path(folder))[0], device="cpu")


@cache
def model_of(name: str, seed: int) -> Any:
    if name == "real":
        return real()
    return Backbone.from_config(real().config, seed=seed) if name == "random" else Pixels(real())


class Pixels:
    """Replaces a backbone: a patch is its 4 x 4 mean colours, an image its 16 x 16."""

    def __init__(self, like: Backbone) -> None:
        self.preprocess, self.patch_size = like.preprocess, like.patch_size
        self.config = SimpleNamespace(depth=like.config.depth, embed_dim=48)

    def extract_features(
        self, images: Any, size: Any = None, fit: Any = None, layers: Sequence[int] = (), **_: Any
    ) -> Features:
        batch = self.preprocess.with_options(size, fit).batch(each_image(images))
        h, w = (side // self.patch_size for side in batch.pixels.shape[2:])
        cells = F.interpolate(batch.pixels, size=(4 * h, 4 * w), mode="area")
        tokens = F.unfold(cells, 4, stride=4).mT
        whole = F.interpolate(batch.pixels, size=(16, 16), mode="area").flatten(1)
        none = tokens[:, :0]
        layer = LayerFeatures(whole, none, tokens, (h, w))
        return Features(whole, whole, none, tokens, (h, w), batch.placements, batch.valid, (layer,) * len(layers or ()))

    def iter_features(self, images: Iterable[ImageLike], batch_size: int = 1, **options: Any) -> Iterator[Features]:
        return (self.extract_features(image, **options) for image in images)

    def embed(self, images: Iterable[ImageLike], normalize: bool = False, **options: Any) -> np.ndarray:
        found = torch.cat([f.embedding for f in self.iter_features(images, **options)])
        return (F.normalize(found, dim=-1) if normalize else found).numpy()
