"""Measures of quality with their published definitions: IoU, AP, depth errors, PQ, J&F, epipolar inliers."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_infer import InputError

IGNORE = 255  # in the truth: nobody says what this pixel is
Found: TypeAlias = tuple[Tensor, Tensor, Tensor]  # of one image: scores [n], regions, classes [n]
Truth: TypeAlias = tuple[Tensor, Tensor]  # of one image: regions, classes [m]
Segments: TypeAlias = tuple[Tensor, Tensor]  # of one image: masks [n, height, width] bool, classes [n]


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
    """Mean over classes of intersection over union, each summed over all images [height, width] of whole numbers.

    255 in the truth is left out, and classes that are in neither.  The background 0 is a class like others.

    Raises: InputError for shapes that differ and labels out of range.
    """
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long)  # truth, predicted
    for number, (found, right) in enumerate(zip(predicted, truth, strict=True)):
        if found.shape != right.shape:
            raise InputError(f"image {number} is {list(found.shape)}, its truth {list(right.shape)}; give one size")
        known = right != IGNORE
        a, b = right[known].long(), found[known].long()
        if len(a) and not (min(a.min(), b.min()) >= 0 and max(a.max(), b.max()) < num_classes):
            raise InputError(
                f"labels of image {number} reach from {min(a.min(), b.min())} to {max(a.max(), b.max())}; "
                f"with {num_classes} classes they are 0 to {num_classes - 1}"
            )
        counts += torch.bincount(a * num_classes + b, minlength=num_classes**2).view(num_classes, -1)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    each = counts.diagonal().double() / union
    return float(each[union > 0].mean())


def average_precision(found: Sequence[Found], truth: Sequence[Truth], threshold: float = 0.5) -> float:
    """COCO's AP at one threshold of intersection over union: precision at 101 recalls, mean over classes of the truth.

    One entry for each image.  A thing found takes the truth that it overlaps most, best scores first, each once; at
    most 100 of a class count in an image.  For AP over 0.50 to 0.95 take the mean of ten calls.
    """
    if len(found) != len(truth):
        raise InputError(f"there are results for {len(found)} images and truth for {len(truth)}; give both for each")
    labels = torch.cat([classes for _, classes in truth]).unique() if truth else torch.empty(0)
    if not len(labels):
        raise InputError("the truth holds nothing to be found; give at least one region")
    return float(torch.stack([_precision(found, truth, int(label), threshold) for label in labels]).mean())


def _precision(found: Sequence[Found], truth: Sequence[Truth], label: int, threshold: float) -> Tensor:
    """The precision of one class, float64."""
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


def panoptic_quality(found: Sequence[Segments], truth: Sequence[Segments]) -> float:
    """Mean over classes of the overlap of matched segments, less what is missed and what is made up.

    Segments of one class match above an intersection over union of 0.5.  Source: arXiv 1801.00868, section 4.1.
    """
    each = []
    for number in torch.cat([classes for _, classes in truth]).unique().tolist():
        overlap, matched, count = 0.0, 0, 0
        for (masks, classes), (right, right_classes) in zip(found, truth, strict=True):
            ours, theirs = masks[classes == number], right[right_classes == number]
            count += len(ours) + len(theirs)
            if len(ours) and len(theirs):
                values = iou(ours, theirs)
                overlap += float(values[values > 0.5].sum())
                matched += int((values > 0.5).sum())
        each.append(overlap / (matched + (count - 2 * matched) / 2))
    return sum(each) / len(each)


def region_and_contour(found: Tensor, truth: Tensor) -> float:
    """Mean of J, the intersection over union of masks [height, width] bool, and F, how well their contours agree.

    A point of a contour is right where the other contour is within 0.8 % of the diagonal.  Source: DAVIS (Perazzi et
    al., "A benchmark dataset and evaluation methodology for video object segmentation", 2016), section 4.
    """
    if not truth.any() or not found.any():
        return float(truth.any() == found.any())
    reach = max(1, round(0.008 * (truth.shape[0] ** 2 + truth.shape[1] ** 2) ** 0.5))
    ours, theirs = contour(found), contour(truth)
    precision = float((ours & wider(theirs, reach)).sum() / ours.sum())
    recall = float((theirs & wider(ours, reach)).sum() / theirs.sum())
    agreement = 2 * precision * recall / max(precision + recall, 1e-9)
    return (float(iou(found, truth)) + agreement) / 2


def contour(mask: Tensor) -> Tensor:
    """The pixels of a mask next to a pixel outside it, or to the border of the image."""
    return mask & wider(~F.pad(mask, (1, 1, 1, 1)), 1)[1:-1, 1:-1]


def wider(mask: Tensor, reach: int) -> Tensor:
    """All pixels within a distance of `reach` from a mask."""
    rows, columns = torch.meshgrid(*(torch.arange(-reach, reach + 1),) * 2, indexing="ij")
    disc = (rows**2 + columns**2 <= reach**2).float()
    return F.conv2d(mask[None, None].float(), disc[None, None], padding=reach)[0, 0] > 0.5


def epipolar_inliers(here: Tensor, there: Tensor, within: float, seed: int, rounds: int = 500) -> float:
    """Share of point pairs [n, 2] that one fundamental matrix explains to `within` pixels, the best that is found.

    Source: the normalised eight-point algorithm (Hartley 1997) on samples of 8 (RANSAC).
    """
    generator, best = torch.Generator().manual_seed(seed), 0.0
    a, b = (torch.cat((p.double(), torch.ones(len(p), 1).double()), dim=1) for p in (here, there))
    to_a, to_b = normalising(here.double()), normalising(there.double())
    for _ in range(rounds):
        some = torch.randperm(len(a), generator=generator)[:8]
        rows = torch.einsum("ni,nj->nij", b[some] @ to_b.T, a[some] @ to_a.T).flatten(1)
        u, s, v = torch.linalg.svd(torch.linalg.svd(rows, full_matrices=True)[2][-1].view(3, 3))
        matrix = to_b.T @ (u @ torch.diag(s * torch.tensor([1.0, 1.0, 0.0])) @ v) @ to_a
        lines, back = a @ matrix.T, b @ matrix
        error = (b * lines).sum(dim=1).abs()
        far = torch.maximum(error / lines[:, :2].norm(dim=1), error / back[:, :2].norm(dim=1))
        best = max(best, float((far < within).double().mean()))
    return best


def normalising(points: Tensor) -> Tensor:
    """The [3, 3] matrix that maps points to mean 0 and mean distance sqrt 2."""
    middle = points.mean(dim=0)
    scale = 2**0.5 / (points - middle).norm(dim=1).mean()
    return torch.tensor([[scale, 0, -scale * middle[0]], [0, scale, -scale * middle[1]], [0, 0, 1]]).double()
