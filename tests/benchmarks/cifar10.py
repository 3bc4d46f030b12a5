"""CIFAR-10 for the recorded training runs: its images, 20-NN and a linear probe with intervals."""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks" / "nano"), str(ROOT / "tests" / "support")]

from evaluate import cifar10, knn, wilson  # noqa: E402

from dinov3_infer import Backbone  # noqa: E402

__all__ = ["Pictures", "accuracies", "cifar10", "knn", "vectors"]


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """uint8 images [N, 32, 32, 3] as a torch Dataset.  Only the health checks use `targets`."""

    def __init__(self, pixels: np.ndarray, targets: Tensor) -> None:
        self.pixels, self.targets = pixels, targets

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.pixels[index]).permute(2, 0, 1)


def vectors(pixels: np.ndarray, model: Backbone | None, side: int) -> Tensor:
    """One vector per image, [N, C]: the class token at `side` pixels, or without a model the pixels."""
    if model is None:
        return torch.from_numpy(pixels).flatten(1).float()
    return torch.from_numpy(model.embed(list(pixels), size=side))


def linear(known: Tensor, classes: Tensor, asked: Tensor, truth: Tensor, decay: float = 1e-3) -> list[float]:
    """Accuracy of logistic regression on standardised features, fitted by L-BFGS, with Wilson's 95 % interval."""
    mean, std = known.mean(0), known.std(0).clamp(min=1e-6)
    known, asked = (known - mean) / std, (asked - mean) / std
    weight, bias = torch.zeros(known.shape[1], 10, requires_grad=True), torch.zeros(10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(known @ weight + bias, classes) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    hits = int(((asked @ weight + bias).argmax(-1) == truth).sum())
    return wilson(hits, len(truth))


def accuracies(known: Tensor, classes: Tensor, asked: Tensor, truth: Tensor) -> dict[str, list[float]]:
    """20-NN and linear probe, each [value, lower end, upper end]."""
    return {"knn": knn(known, classes, asked, truth), "linear": linear(known, classes, asked, truth)}
