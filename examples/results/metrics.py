"""Measures that the package does not have: panoptic quality, region and contour of a track, geometry of matches."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_infer.tasks.metrics import iou

Segments = tuple[Tensor, Tensor]  # of one picture: masks [n, height, width] bool that do not overlap, classes [n]


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
    """The pixels of a mask beside one that is not in it, or beside the border of the picture."""
    return mask & wider(~F.pad(mask, (1, 1, 1, 1)), 1)[1:-1, 1:-1]


def wider(mask: Tensor, reach: int) -> Tensor:
    """All pixels within `reach` of a mask, by a disc."""
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
    """The [3, 3] matrix that brings points to mean 0 and mean distance sqrt 2."""
    middle = points.mean(dim=0)
    scale = 2**0.5 / (points - middle).norm(dim=1).mean()
    return torch.tensor([[scale, 0, -scale * middle[0]], [0, scale, -scale * middle[1]], [0, 0, 1]]).double()
