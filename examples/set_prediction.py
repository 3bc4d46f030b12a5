"""Shared by detection.py and masks.py: Hungarian matching of queries and objects, losses, annotations."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3_infer import InputError


def assign(cost: Tensor) -> Tensor:
    """A different column for each row of a cost matrix [n, m], n <= m, with the least total cost, [n].

    Rows are added one by one along the shortest augmenting path (Hungarian method of Jonker and Volgenant).
    """
    matrix = np.pad(cost.detach().cpu().double().numpy(), ((1, 0), (1, 0)))  # row 0 and column 0 mean "none"
    rows, columns = np.zeros(len(matrix)), np.zeros(matrix.shape[1])  # dual variables
    taken, came_from = np.zeros(matrix.shape[1], np.int64), np.zeros(matrix.shape[1], np.int64)
    for row in range(1, len(matrix)):
        taken[0], column = row, 0
        shortest, done = np.full(matrix.shape[1], np.inf), np.zeros(matrix.shape[1], bool)
        while taken[column]:
            done[column] = True
            reduced = matrix[taken[column]] - rows[taken[column]] - columns
            shorter = ~done & (reduced < shortest)
            shortest[shorter], came_from[shorter] = reduced[shorter], column
            following = int(np.where(done, np.inf, shortest).argmin())
            step = shortest[following]
            rows[taken[done]] += step
            columns[done] -= step
            shortest[~done] -= step
            column = following
        while column:
            taken[column], column = taken[came_from[column]], came_from[column]
    order = taken[1:].argsort(kind="stable")
    return torch.from_numpy(order[len(order) - len(cost) :]) if len(cost) else torch.zeros(0, dtype=torch.long)


def focal(scores: Tensor, truth: Tensor) -> Tensor:
    """Focal loss of scores before the sigmoid with `truth`, both [..., K], of the same shape (arXiv 1708.02002)."""
    chance, loss = scores.sigmoid(), F.binary_cross_entropy_with_logits(scores, truth, reduction="none")
    return loss * (truth * 0.25 * (1 - chance) ** 2 + (1 - truth) * 0.75 * chance**2)


def class_cost(scores: Tensor, classes: Tensor) -> Tensor:
    """Cost [n, P] of assigning each of P queries, with scores [P, K], to each of n objects of these classes [n]."""
    yes, no = focal(scores, torch.ones_like(scores)), focal(scores, torch.zeros_like(scores))
    return (yes - no)[:, classes].T


def class_loss(scores: Tensor, classes: list[Tensor], queries: list[Tensor]) -> Tensor:
    """Focal loss [] of all queries [B, P, K]; in each image, `queries` [n] are assigned to objects of `classes` [n]."""
    truth = torch.zeros_like(scores)
    for number, (names, chosen) in enumerate(zip(classes, queries, strict=True)):
        truth[number, chosen, names] = 1.0
    return focal(scores, truth).sum() / max(1, sum(map(len, classes)))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union of boxes [..., 4] (left, top, right, bottom) (arXiv 1902.09630)."""

    def area(low: Tensor, high: Tensor) -> Tensor:
        return (high - low).clamp(min=0).prod(dim=-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return both / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def mask_cost(masks: Tensor, share: Tensor) -> Tensor:
    """Cross-entropy and Dice loss of masks [P, pixels] before the sigmoid with n segments, [n, P].

    `share`: the share of each pixel that a segment covers, [n, pixels].

    Source: weights of Mask2Former (arXiv 2112.01527).
    """
    chance = masks.sigmoid()
    cross = F.softplus(masks).mean(dim=-1) - share @ masks.T / masks.shape[1]
    dice = 1 - (2 * share @ chance.T + 1) / (chance.sum(dim=-1) + share.sum(dim=-1, keepdim=True) + 1)
    return 5 * cross + 5 * dice


def read_coco(path: str) -> tuple[list[str], list[tuple[Tensor, Tensor]], list[str]]:
    """Reads COCO annotations.

    Returns names of images, their boxes [n, 4] in 0..1 with classes [n], and names of classes.

    Raises: InputError for a file that is not in COCO's format.
    """
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        number = {one["id"]: i for i, one in enumerate(stored["categories"])}
        things: dict[int, list[tuple[list[float], int]]] = {one["id"]: [] for one in stored["images"]}
        sizes = {one["id"]: (one["width"], one["height"]) for one in stored["images"]}
        for one in stored["annotations"]:
            (x, y, w, h), (width, height) = one["bbox"], sizes[one["image_id"]]
            box = [x / width, y / height, (x + w) / width, (y + h) / height]
            things[one["image_id"]].append((box, number[one["category_id"]]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"'{path}' is not in COCO's format ({type(error).__name__}: {error}); give a JSON file with images, "
            "annotations with bbox and category_id, and categories"
        ) from None
    if not things or not number:
        raise InputError(f"'{path}' has {len(things)} images and {len(number)} categories; give at least one of each")
    found = [
        (torch.tensor([b for b, _ in t]).view(-1, 4), torch.tensor([c for _, c in t]).long()) for t in things.values()
    ]
    return [one["file_name"] for one in stored["images"]], found, [one["name"] for one in stored["categories"]]


def read_segments(folder: str, images: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Masks [n, height, width] bool and classes [n] of images, from PNGs of 1000 * class + object number.

    Raises: InputError for a PNG of another kind.
    """
    found = []
    for path in (Path(folder, Path(name).stem + ".png") for name in images):
        with Image.open(path) as image:
            if image.mode not in ("I;16", "I", "L"):
                raise InputError(f"'{path}' is an image of mode {image.mode}; give a 16-bit grey PNG")
            pixels = torch.from_numpy(np.array(image).astype(np.int64))
        values = pixels.unique()
        found.append((pixels == values[:, None, None], values // 1000))
    return found
