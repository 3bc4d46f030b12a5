"""How good it is, by the definitions of the field."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import InputError
from .segmentation import IGNORE

__all__ = ["average_precision", "depth_errors", "iou", "mean_iou"]

Found: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of one picture: scores [n], regions, classes [n]
Truth: TypeAlias = tuple[Tensor, Tensor]  # of one picture: regions, classes [m]


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of regions with regions, [n, m]: boxes [n, 4] (left, top, right, bottom) or bool masks
    [n, height, width]; of two masks [height, width] one number.  Nothing with nothing is 0.

    Raises: InputError for regions of different kinds or sizes.
    """
    if first.ndim == second.ndim == 2 and first.dtype == second.dtype == torch.bool:
        return iou(first[None], second[None])[0, 0]
    if first.dtype == torch.bool:
        if first.shape[1:] != second.shape[1:] or second.dtype != torch.bool or first.ndim != 3:
            raise InputError(f"masks are bool and of one size, got {list(first.shape)} and {list(second.shape)}")
        a, b = first.flatten(1).float(), second.flatten(1).float()
        shared, areas = a @ b.T, (a.sum(1), b.sum(1))
    else:
        if first.shape[1:] != (4,) or second.shape[1:] != (4,):
            raise InputError(f"boxes are [n, 4], got {list(first.shape)} and {list(second.shape)}")
        sides = torch.minimum(first[:, None, 2:], second[:, 2:]) - torch.maximum(first[:, None, :2], second[:, :2])
        shared = sides.clamp(min=0).prod(-1)
        areas = ((first[:, 2:] - first[:, :2]).prod(-1), (second[:, 2:] - second[:, :2]).prod(-1))
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-9)


def mean_iou(predicted: Sequence[Tensor], truth: Sequence[Tensor], num_classes: int) -> float:
    """Mean over classes of intersection over union, each summed over all pictures [height, width] of whole numbers.

    255 in the truth is left out, and classes that are in neither.  The background 0 is a class like others.

    Raises: InputError for shapes that differ and labels out of range.
    """
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long)  # truth, predicted
    for number, (found, right) in enumerate(zip(predicted, truth, strict=True)):
        if found.shape != right.shape:
            raise InputError(f"picture {number} is {list(found.shape)}, its truth {list(right.shape)}; give one size")
        known = right != IGNORE
        a, b = right[known].long(), found[known].long()
        if len(a) and not (min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) < num_classes):
            raise InputError(
                f"labels of picture {number} reach from {min(a.min(), b.min())} to {max(a.max(), b.max())}; "
                f"with {num_classes} classes they are 0 to {num_classes - 1}"
            )
        counts += torch.bincount(a * num_classes + b, minlength=num_classes**2).view(num_classes, -1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    each = counts.diagonal().double() / union
    return float(each[union > 0].mean())


def average_precision(found: Sequence[Found], truth: Sequence[Truth], threshold: float = 0.5) -> float:
    """COCO's AP at one threshold of intersection over union: precision at 101 recalls, mean over classes of the truth.

    One entry for each picture.  A thing found takes the truth that it overlaps most, best scores first, each once; at
    most 100 of a class count in a picture.  For AP over 0.50 to 0.95 take the mean of ten calls.
    """
    if len(found) != len(truth):
        raise InputError(f"there are results for {len(found)} pictures and truth for {len(truth)}; give both for each")
    labels = torch.cat([classes for _, classes in truth]).unique() if truth else torch.empty(0)
    if not len(labels):
        raise InputError("the truth holds nothing to be found; give at least one region")
    return float(torch.stack([_precision(found, truth, int(label), threshold) for label in labels]).mean())


def _precision(found: Sequence[Found], truth: Sequence[Truth], label: int, threshold: float) -> Tensor:
    """Of one class, float64."""
    scores, hits, total = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)], 0
    for (given, regions, classes), (right, right_classes) in zip(found, truth, strict=True):
        right = right[right_classes == label]
        total += len(right)
        mine = classes == label
        order = given[mine].argsort(descending=True, stable=True)[:100]
        overlap = iou(regions[mine][order], right) if len(order) and len(right) else torch.zeros(len(order), len(right))
        hit = torch.zeros(len(order), dtype=torch.bool)
        for i, row in enumerate(overlap if len(right) else []):
            best = int(row.argmax())
            if row[best] >= threshold:
                hit[i] = True
                overlap[:, best] = -1  # is taken
        scores.append(given[mine][order].float())
        hits.append(hit)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    hit = torch.cat(hits)[order].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0) if len(hit) else precision
    at = torch.searchsorted(hit.cumsum(0) / total, torch.linspace(0, 1, 101, dtype=torch.float64))
    return torch.cat((precision, precision.new_zeros(1)))[at].mean()


def depth_errors(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """`abs_rel`, the mean of |d - t| / t; `rmse`; `delta1`, the share with max(d / t, t / d) below 1.25.

    Over the pixels whose truth is above 0 and finite.  Source: Eigen et al., "Depth map prediction from a single
    image", 2014.
    """
    known = (truth > 0) & truth.isfinite()
    if predicted.shape != truth.shape or not known.any():
        raise InputError(
            f"depth is {list(predicted.shape)} and its truth {list(truth.shape)} with {int(known.sum())} known pixels; "
            "give maps of one size with something known"
        )
    d, t = predicted[known].double(), truth[known].double()
    return {
        "abs_rel": float(((d - t).abs() / t).mean()),
        "rmse": float((d - t).square().mean().sqrt()),
        "delta1": float((torch.maximum(d / t, t / d) < 1.25).double().mean()),
    }
