"""Weights from a fixed rule, the same in every version of every library; recorded numbers were computed with them."""

import math

import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def filled(model: nn.Module, seed: int) -> nn.Module:
    """Fills every tensor, in the order of Meta's names, from numpy's legacy generator."""
    draw = np.random.RandomState(seed)
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        r = draw.standard_normal(tensor.shape)
        if name.endswith("gamma"):
            value = 0.5 + 0.1 * r
        elif name.endswith("running_var"):
            value = 1 + 0.1 * np.abs(r)
        elif tensor.ndim > 1:
            value = r / np.sqrt(math.prod(tensor.shape[1:]))
        else:
            value = 1 + 0.1 * r if name.endswith("weight") else 0.1 * r
        tensor.copy_(torch.from_numpy(value))
    return model.eval()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))
