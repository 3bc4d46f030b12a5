"""Metrics compared with hand calculation, scikit-learn and pycocotools."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint
from repository import BENCHMARKS
from torch import Tensor

from dinov3_infer import InputError

sys.path.insert(0, str(BENCHMARKS / "tasks"))

from metrics import average_precision, depth_errors, iou, mean_iou  # noqa: E402


def test_mean_iou_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, 255, 255]])
    found = torch.tensor([[0, 1, 1, 1], [2, 0, 1, 9]])
    assert mean_iou([found], [truth], 5) == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)  # 3 and 4 occur nowhere
    assert mean_iou([found, truth], [truth, truth], 5) == pytest.approx((3 / 5 + 4 / 5 + 3 / 4) / 3)
    assert "labels of image 0 reach from 0 to 2; with 2 classes" in complaint(
        InputError, lambda: mean_iou([found], [truth], 2)
    )
    assert "give one size" in complaint(InputError, lambda: mean_iou([found[:1]], [truth], 5))


@pytest.mark.peers
def test_mean_iou_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, found = torch.randint(5, (2, 3, 40, 50))
    expected = metrics.jaccard_score(truth.flatten(), found.flatten(), average="macro")
    assert mean_iou(list(found), list(truth), 5) == pytest.approx(expected)


def test_intersection_over_union_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0], [2.0, 0.0, 6.0, 2.0], [9.0, 9.0, 9.5, 9.5]])
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, :2, :4] = masks[1, :2, 2:6] = masks[2, 9, 9] = True
    expected = torch.tensor([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]])
    assert torch.allclose(iou(boxes, boxes), expected) and torch.allclose(iou(masks, masks), expected)
    assert (
        float(iou(masks[0], masks[1])) == pytest.approx(1 / 3) and float(iou(masks[0] & False, masks[1] & False)) == 0
    )
    assert "of one size" in complaint(InputError, lambda: iou(masks, masks[:, :5]))
    assert "boxes are [n, 4]" in complaint(InputError, lambda: iou(boxes, boxes[:, :3]))


def detections(seed: int, kind: str) -> tuple[list[Any], list[Any]]:
    """Found and true boxes or masks of 12 images: shifted copies, duplicates, false boxes, misses, empty images."""
    rng = np.random.default_rng(seed)
    found, truth = [], []

    def region(box: np.ndarray) -> np.ndarray:
        if kind == "boxes":
            return box
        mask = np.zeros((64, 64), bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        return mask

    for _ in range(12):
        corners = rng.integers(0, 40, (rng.integers(0, 5), 2))
        true = np.concatenate((corners, corners + rng.integers(6, 20, corners.shape)), axis=1)
        moved = [box + rng.integers(-3, 4, 4) * [1, 1, 0, 0] for box in true for _ in range(rng.integers(0, 3))]
        strange = [np.r_[c, c + 10] for c in rng.integers(0, 50, (rng.integers(0, 3), 2))]
        boxes = np.clip(np.array([*moved, *strange], int).reshape(-1, 4), 0, 63)
        shape = (0, 4) if kind == "boxes" else (0, 64, 64)
        as_regions = [
            torch.from_numpy(np.array([region(b) for b in many]))
            if len(many)
            else torch.zeros(shape, dtype=torch.bool if kind == "masks" else torch.long)
            for many in (boxes, true)
        ]
        as_regions = [r.float() if kind == "boxes" else r for r in as_regions]
        scores = torch.from_numpy(rng.permutation(len(boxes) * 7)[: len(boxes)] / 100.0)
        found.append((scores.float(), as_regions[0], torch.from_numpy(rng.integers(1, 3, len(boxes)))))
        truth.append((as_regions[1], torch.from_numpy(rng.integers(1, 3, len(true)))))
    return found, truth


def test_average_precision_by_hand() -> None:
    """Hit, miss, hit, and one object never found: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    found = [(torch.tensor([0.9, 0.8, 0.7]), torch.stack((boxes[0], boxes[0], boxes[1] + 1)), torch.ones(3).long())]
    truth = [(boxes, torch.ones(3).long())]
    assert average_precision(found, truth) == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert average_precision(found, truth, threshold=0.9) == pytest.approx(34 / 101)
    late = [(found[0][0], torch.stack((boxes[0] + 90, boxes[0], boxes[1])), found[0][2])]  # a miss, then two hits
    assert average_precision(late, truth) == pytest.approx(67 * 2 / 3 / 101)
    assert average_precision([(torch.empty(0), boxes[:0], torch.empty(0).long())], truth) == 0
    assert "1 images and truth for 0" in complaint(InputError, lambda: average_precision(found, []))
    assert "nothing to be found" in complaint(
        InputError, lambda: average_precision(found, [(boxes[:0], torch.empty(0))])
    )


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_average_precision_is_pycocotools(threshold: float, kind: str) -> None:
    pytest.importorskip("pycocotools")
    from pycocotools import mask as coder
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(region: Tensor, **more: Any) -> dict[str, Any]:
        if kind == "boxes":
            left, top, right, bottom = region.tolist()
            return dict(bbox=[left, top, right - left, bottom - top], area=(right - left) * (bottom - top), **more)
        return dict(
            segmentation=coder.encode(np.asfortranarray(region.numpy().astype(np.uint8))),
            area=int(region.sum()),
            **more,
        )

    for seed in range(4):
        found, truth = detections(seed, kind)
        true = [
            entry(r, image_id=i, category_id=int(c), iscrowd=0)
            for i, (rs, cs) in enumerate(truth)
            for r, c in zip(rs, cs, strict=True)
        ]
        mine = [
            entry(r, image_id=i, category_id=int(c), score=float(s), iscrowd=0)
            for i, each in enumerate(found)
            for s, r, c in zip(*each, strict=True)
        ]
        known, given = COCO(), COCO()
        for coco, entries in ((known, true), (given, mine)):
            for number, one in enumerate(entries):
                one["id"] = number + 1
            coco.dataset = dict(
                images=[dict(id=i, height=64, width=64) for i in range(12)],
                categories=[dict(id=1), dict(id=2)],
                annotations=entries,
            )
            coco.createIndex()
        run = COCOeval(known, given, {"boxes": "bbox", "masks": "segm"}[kind])
        run.params.iouThrs = np.array([threshold])
        run.evaluate()
        run.accumulate()
        precision = run.eval["precision"][0, :, :, 0, -1]
        assert average_precision(found, truth, threshold) == pytest.approx(
            precision[:, precision[0] > -1].mean(), abs=1e-6
        )


def test_depth_errors_by_formula() -> None:
    truth = torch.tensor([[2.0, 4.0, 0.0], [10.0, torch.inf, 1.0]])
    found = torch.tensor([[2.2, 5.2, 7.0], [8.0, 1.0, 1.0]])
    errors = depth_errors(found, truth)
    assert errors["abs_rel"] == pytest.approx((0.1 + 0.3 + 0.2 + 0) / 4)
    assert errors["rmse"] == pytest.approx(((0.04 + 1.44 + 4 + 0) / 4) ** 0.5)
    assert errors["delta1"] == pytest.approx(2 / 4)  # 5.2 / 4 is 1.3, and 10 / 8 is not below 1.25
    assert "0 known pixels" in complaint(InputError, lambda: depth_errors(found, truth * 0))
