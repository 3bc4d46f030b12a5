"""Patch features as colours: three principal components to red, green and blue."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..features import Features

__all__ = ["pca_picture", "pca_rgb"]


def pca_rgb(features: Features | Sequence[Features]) -> list[np.ndarray]:
    """One picture [h, w, 3] uint8 per input picture, a pixel per patch, by components fitted to all of them together.

    So equal colours mean similar features across pictures.  Signs are fixed: each component points to where its largest
    loading is positive.  Each channel spans the 1st to the 99th percentile; padding is black and does not count.

    Source: DINOv2 paper (arXiv 2304.07193), section 7.5.
    """
    batches = [features] if isinstance(features, Features) else list(features)
    if not batches:
        raise InputError("pca_rgb got no features; give the result of extract_features")
    valid = [
        torch.ones(len(f), *f.grid, dtype=torch.bool) if f.valid is None else f.valid.cpu() for f in batches
    ]  # fmt: skip
    tokens = torch.cat(
        [f.patch_tokens.detach().cpu().float()[v.flatten(1)] for f, v in zip(batches, valid, strict=True)]
    )
    if len(tokens) < 3:
        raise InputError(f"three components need at least 3 patches, got {len(tokens)}; give a larger picture")
    projected = _project(tokens)
    low, high = (torch.quantile(projected, q, dim=0) for q in (0.01, 0.99))
    colours = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).mul(255).round().to(torch.uint8)
    pictures, start = [], 0
    for mask in (mask for batch in valid for mask in batch):
        picture = torch.zeros(*mask.shape, 3, dtype=torch.uint8)
        picture[mask] = colours[start : start + int(mask.sum())]
        start += int(mask.sum())
        pictures.append(picture.numpy())
    return pictures


def _project(tokens: Tensor) -> Tensor:  # [P, C]
    """Onto the first three principal components, [P, 3]."""
    centred = tokens - tokens.mean(dim=0)
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())  # ascending
    components = vectors[:, -3:].flip(1).float()
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    projected: Tensor = centred @ (components * largest.sign())
    return projected


def pca_picture(image: Image.Image, colours: np.ndarray) -> Image.Image:  # colours: [h, w, 3] uint8
    """The picture and its colours side by side, at the size of the picture."""
    side = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (2 * image.width + 8, image.height), "white")
    sheet.paste(image.convert("RGB"), (0, 0))
    sheet.paste(side, (image.width + 8, 0))
    return sheet
