"""Principal components of patch tokens, and their colours."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["colours", "project"]


def project(tokens: Tensor, count: int) -> Tensor:  # [P, C]
    """Projects tokens [P, C] onto their first principal components, [P, count] float32.

    The sign of a component is arbitrary.  It is set so that the sum of the cubes of the loadings is positive.  This
    sign stays the same when the image size changes (71 of 72 components on four photographs; with the largest loading:
    67).
    """
    centred = (tokens - tokens.mean(dim=0)).double()
    if len(centred) >= centred.shape[1]:
        _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
        components = vectors[:, -count:].flip(1)
    else:  # the smaller of the two matrices has the same eigenvalues
        _, vectors = torch.linalg.eigh(centred @ centred.T)
        components = torch.nn.functional.normalize(centred.T @ vectors[:, -count:].flip(1), dim=0)
    projected: Tensor = centred @ (components * (components**3).sum(dim=0).sign())
    return projected.float()


def colours(projected: Tensor) -> np.ndarray:  # [P, 3]
    """Colours [P, 3] uint8 of projected tokens [P, 3]; each channel spans the 1st to the 99th percentile."""
    values = projected.numpy()
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    found: np.ndarray = (((values - low) / np.maximum(high - low, 1e-12)).clip(0, 1) * 255).round().astype(np.uint8)
    return found
