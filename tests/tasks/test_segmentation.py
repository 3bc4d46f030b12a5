"""Segmentation from a few marked images, and by a trained layer."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pictures import complaint
from repository import BENCHMARKS
from torch import Tensor

from dinov3_infer import Features, InputError
from dinov3_infer.images.preprocess import Placement
from dinov3_infer.tasks import OneShotSegmenter, SegmentationHead
from dinov3_infer.tasks.segmentation import _Pixels

sys.path.insert(0, str(BENCHMARKS / "tasks"))

from metrics import iou, mean_iou  # noqa: E402

CENTRES = F.normalize(torch.randn(4, 24, generator=torch.Generator().manual_seed(7)), dim=-1) * 5


def scene(
    seed: int, *, noise: float = 0.5, size: tuple[int, int] = (160, 224), classes: tuple[int, ...] = (1, 2, 3)
) -> tuple[Features, Tensor]:
    """Features of an image of blocks on a background, with patches of 16 pixels, and its mask of classes."""
    generator = torch.Generator().manual_seed(seed)
    h, w = size[0] // 16, size[1] // 16
    coarse = torch.zeros(h, w, dtype=torch.long)
    for c in classes:
        top, left = (int(torch.randint(n - 3, (), generator=generator)) for n in (h, w))
        coarse[top : top + 3, left : left + 3] = c
    tokens = CENTRES[coarse].flatten(0, 1)[None] + noise * torch.randn(1, h * w, 24, generator=generator)
    place = Placement(size, size, (0, 0, *size))
    mask = coarse.repeat_interleave(16, 0).repeat_interleave(16, 1)
    return Features(tokens[:, 0], tokens[:, 0], tokens[:, :0], tokens, (h, w), (place,)), mask


KINDS: dict[str, OneShotSegmenter | SegmentationHead] = {
    "prototypes": OneShotSegmenter(),
    "head": SegmentationHead(steps=150, pixels=512, learning_rate=1e-2),
}
by_kind = pytest.mark.parametrize("segmenter", KINDS.values(), ids=KINDS)


@by_kind
def test_classes_are_found_on_other_images(segmenter: Any, monkeypatch: Any) -> None:
    """One reference has all classes, or several have one class each; masks are in pixels of the original image."""
    (one, mask), (asked, truth) = scene(0), scene(1)
    (found,) = segmenter.fit(one, mask).predict(asked)
    assert found.shape == (160, 224) and found.dtype == torch.int64 and found.device.type == "cpu"
    assert mean_iou([found], [truth], 4) > 0.75
    assert torch.equal(segmenter.scores(asked)[0].argmax(0), found)
    monkeypatch.setattr("dinov3_infer.tasks.segmentation.CHUNK", 3)
    assert torch.equal(segmenter.predict(asked)[0], found)
    several, masks = zip(*(scene(i) for i in (0, 2, 3)), strict=True)
    only = [torch.where((m == c) | (m == 0), m, 255) for c, m in zip((1, 2, 3), masks, strict=True)]
    (found,) = segmenter.fit(several, [m.numpy() for m in only]).predict([asked])
    assert mean_iou([found], [truth], 4) > 0.7


@by_kind
def test_a_bool_mask_is_one_class(segmenter: Any) -> None:
    """The object is found within a quarter of a patch."""
    (one, mask), (asked, truth) = (scene(seed, noise=0.3, classes=(2,)) for seed in (0, 1))
    (found,) = segmenter.fit(one, mask == 2).predict(asked)
    assert found.unique().tolist() == [0, 1] and iou(found == 1, truth == 2) > 0.5  # corners are rounded
    middles = [(where.nonzero() + 0.5).median(dim=0).values for where in (found == 1, truth == 2)]
    assert (middles[0] - middles[1]).abs().max() <= 4


def test_batches_are_images_and_sizes_may_differ() -> None:
    features, masks = zip(*(scene(i) for i in range(3)), strict=True)
    tokens = torch.cat([f.patch_tokens for f in features])
    batch = Features(tokens[:, 0], tokens[:, 0], tokens[:, :0], tokens, (10, 14), (features[0].placements[0],) * 3)
    wide, _ = scene(5, size=(96, 320))
    segmenter = OneShotSegmenter().fit(batch, torch.stack(list(masks)))
    found = segmenter.predict([batch, wide])
    assert [tuple(f.shape) for f in found] == [(160, 224)] * 3 + [(96, 320)]
    assert torch.equal(found[1], segmenter.predict(features[1])[0])


def test_prototypes_are_the_mean_patch_of_each_class() -> None:
    """Compared with a loop; one patch is half of each class, and two patches have few labels."""
    one, mask = scene(0)
    mask = mask.clone()
    mask[:8, :16] = 1
    mask[8:16, :16] = 0
    mask[:6, 16:32] = mask[:14, 32:48] = 255
    prototypes = torch.zeros(4, 24)
    for i, token in enumerate(F.normalize(one.patch_tokens[0], dim=-1)):
        row, column = divmod(i, 14)
        labels = mask[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16].flatten()
        labels = labels[labels != 255]
        for label in labels if len(labels) >= 128 else []:
            prototypes[label] += token / len(labels)
    expected = F.normalize(one.patch_tokens[0], dim=-1) @ F.normalize(prototypes, dim=-1).T
    maps = OneShotSegmenter().fit(one, mask)._maps(one)
    assert torch.allclose(maps.flatten(1).T, expected, atol=1e-4)


@pytest.mark.parametrize(
    "place, grid",
    [
        (Placement((40, 60), (48, 64), (0, 0, 48, 64)), (3, 4)),  # squashed
        (Placement((40, 60), (48, 72), (0, 12, 48, 48)), (3, 3)),  # cropped
        (Placement((40, 60), (32, 48), (0, 0, 48, 48)), (3, 3)),  # padded
    ],
    ids=["native", "crop", "pad"],
)
def test_pixels_are_drawn_where_the_model_looked(place: Placement, grid: tuple[int, int]) -> None:
    """The four patches surround the pixel: their weights reproduce its position."""
    h, w = grid
    tokens = torch.zeros(1, h * w, 2)
    one = Features(tokens[:, 0], tokens[:, 0], tokens[:, :0], tokens, grid, (place,))
    mask = torch.arange(40 * 60).view(40, 60) % 251  # differs between neighbouring pixels
    first = torch.zeros(16, 16, dtype=torch.long)
    other = Features(
        tokens[:, 0],
        tokens[:, 0],
        tokens[:, :0],
        tokens[:, :1],
        (1, 1),
        (Placement((16, 16), (16, 16), (0, 0, 16, 16)),),
    )
    rows, weights, labels = _Pixels([other, one], [first, mask])(4000, torch.Generator().manual_seed(0))
    mine = (rows >= 1).all(1)
    assert 0.4 < mine.double().mean() < 0.6 and (rows[~mine] == 0).all() and (labels[~mine] == 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(4000)) and (weights >= 0).all()
    rows, weights, labels = rows[mine] - 1, weights[mine], labels[mine]
    down = ((rows // w) * weights).sum(1) + 0.5  # in patches, away from the borders
    across = ((rows % w) * weights).sum(1) + 0.5
    y = (down / h * place.window[2] + place.window[0]) / place.resized[0] * 40
    x = (across / w * place.window[3] + place.window[1]) / place.resized[1] * 60
    inner = (down > 0.501) & (down < h - 0.501) & (across > 0.501) & (across < w - 0.501)
    assert inner.sum() > 100
    same = (y[inner].long() * 60 + x[inner].long()) % 251 == labels[inner]
    assert same.double().mean() > 0.998  # the others lie on the edge of a pixel, up to rounding
    if place.window[3] == 48 and place.resized[1] == 72:  # for a crop: no pixels from the removed parts
        seen = mask[:, 10:50].unique()
        assert set(labels.tolist()) <= set(seen.tolist())


def test_the_head_minimises_the_loss_over_pixels() -> None:
    """Where features cannot separate two classes, the probabilities match the frequencies."""
    (one, mask), (asked, truth) = scene(0, noise=0.3), scene(1, noise=0.3)
    half = mask.clone()
    half[80:][mask[80:] == 0] = 1  # background below is called class 1
    head = SegmentationHead(steps=400, pixels=512, learning_rate=1e-2, weight_decay=0.0).fit(one, half)
    proba = head.predict_proba(asked)[0]
    assert torch.allclose(proba.sum(0), torch.ones(160, 224), atol=1e-4)
    share = (half[mask == 0] == 1).double().mean()
    assert abs(float(proba[1][truth == 0].mean()) - float(share)) < 0.1
    again = SegmentationHead(steps=400, pixels=512, learning_rate=1e-2, weight_decay=0.0).fit(one, half)
    assert torch.equal(again.predict_proba(asked)[0], proba)


def test_what_was_cropped_away_is_unknown() -> None:
    one, mask = scene(0)
    place = Placement((160, 320), (160, 320), (0, 48, 160, 224))
    cropped = Features(
        *(getattr(one, n) for n in ("embedding", "cls_token", "register_tokens", "patch_tokens")), one.grid, (place,)
    )
    (found,) = OneShotSegmenter().fit(one, mask).predict(cropped)
    assert (found[:, :48] == 255).all() and (found[:, 272:] == 255).all() and found[:, 48:272].max() <= 3


ONE, MASK = scene(0)
WRONG: list[tuple[Any, Any, str]] = [
    (ONE, MASK[:100], "mask 0 is [100, 224] and its image [160, 224]"), (ONE, MASK.T, "after EXIF rotation"),
    (ONE, MASK * 0, "the masks are 0 at every pixel; mark a part"),
    (ONE, MASK * 0 + 3, "the masks are 3 at every pixel"), (ONE, MASK * 0 + 255, "the masks are 255 at every pixel"),
    (ONE, MASK.float() / 3, "holds torch.float32 from 0 to 1"),
    (ONE, MASK - 1, "from -1 to 2; give bool, or whole numbers"), (ONE, MASK * 100, "from 0 to 300"),
    (ONE, [MASK, MASK], "1 images and 2 masks"), ([], [], "0 images and 0 masks"),
]  # fmt: skip


@pytest.mark.parametrize("features, masks, said", WRONG, ids=[said[:30] for *_, said in WRONG])
def test_wrong_masks_are_said(features: Any, masks: Any, said: str) -> None:
    for segmenter in (OneShotSegmenter(), SegmentationHead(steps=1)):
        assert said in complaint(InputError, lambda s=segmenter: s.fit(features, masks))  # type: ignore[misc]


def test_wrong_questions_are_said() -> None:
    segmenter = OneShotSegmenter().fit(ONE, MASK)
    assert "call fit() first" in complaint(InputError, lambda: SegmentationHead().predict(ONE))
    other = Features(
        *(torch.zeros(1, 8) for _ in range(2)), torch.zeros(1, 0, 8), torch.zeros(1, 140, 8), ONE.grid, ONE.placements
    )
    assert "features of width 24, got 8" in complaint(InputError, lambda: segmenter.predict(other))
    place = Placement((160, 448), (160, 448), (0, 0, 160, 224))
    cut = Features(ONE.embedding, ONE.cls_token, ONE.register_tokens, ONE.patch_tokens, ONE.grid, (place,))
    right = torch.zeros(160, 448, dtype=torch.bool)
    right[:, 300:] = True
    assert "was cropped away; use fit='native'" in complaint(InputError, lambda: OneShotSegmenter().fit(cut, right))
