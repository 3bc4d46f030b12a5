"""Feature pyramids: right values at the right positions, and detectors that take them."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint
from repository import BENCHMARKS
from torch import Tensor, nn

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks import Pyramid

sys.path.insert(0, str(BENCHMARKS / "tasks"))

from metrics import iou  # noqa: E402


@pytest.mark.parametrize("family", ["dinov3", "dinov2", "dino"])
@pytest.mark.parametrize("size", [(64, 96), (70, 100), (33, 31)], ids=str)
def test_pyramids_have_the_maps_they_promise(size: tuple[int, int], family: str) -> None:
    """Covers patches of 16, 14 and 8 pixels, and sides that are or are not multiples of the largest stride."""
    pyramid = Pyramid(randomise(Backbone.from_config(SMALL[family])), 12, names=("p2", "p3", "p4", "p5"))  # type: ignore[arg-type]
    maps = pyramid(torch.randn(2, 3, *size))
    assert list(maps) == ["p2", "p3", "p4", "p5"] == list(pyramid.output_shape())
    assert pyramid.out_channels == 12 and pyramid.size_divisibility == 32
    for name, (channels, stride) in pyramid.output_shape().items():
        assert maps[name].shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert maps[name].isfinite().all() and maps[name].std() > 0.1
    assert [level.stride for level in pyramid.output_shape().values()] == [4, 8, 16, 32]


def test_levels_lie_over_each_other(local: Backbone) -> None:
    """Changing one patch changes each level at the position of that patch."""
    pyramid = Pyramid(local, 8).eval()
    plain = torch.randn(1, 3, 256, 256)
    changed = plain.clone()
    changed[..., 96:112, 192:208] += 3
    with torch.no_grad():
        before, after = pyramid(plain), pyramid(changed)
    for name, stride in pyramid.strides.items():
        rows, columns = ((before[name] - after[name])[0].abs().sum(0) > 1e-4).nonzero().T
        middle = (rows.min() + rows.max() + 1) * stride / 2, (columns.min() + columns.max() + 1) * stride / 2
        assert abs(float(middle[0]) - 104) <= stride / 2 and abs(float(middle[1]) - 200) <= stride / 2


def test_a_frozen_backbone_stays_as_it_is() -> None:
    for freeze in (True, False):
        backbone = randomise(Backbone.from_config(SMALL["dinov3"]))
        pyramid = Pyramid(backbone, 8, freeze=freeze).train()  # type: ignore[arg-type]
        assert pyramid.levels.training and backbone.training is not freeze
        sum(m.square().mean() for m in pyramid(torch.randn(1, 3, 64, 64)).values()).backward()  # type: ignore[union-attr]
        learnt = [name for name, p in pyramid.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert any(name.startswith("levels.") for name in learnt)
        assert any(name.startswith("backbone.blocks.0") for name in learnt) is not freeze
        assert all(p.requires_grad is not freeze for p in backbone.parameters())


def test_wrong_strides_are_said(bb: Backbone) -> None:
    for strides, names in (((4, 12), ("a", "b")), ((), ()), ((4, 8), ("a",)), ((4, 8), ("a", "a")), ((0,), ("a",))):
        said = complaint(InputError, lambda s=strides, n=names: Pyramid(bb, strides=s, names=n))  # type: ignore[misc]
        assert "powers of 2 with one name each" in said


def plain_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression in torch, for a torchvision whose compiled operators do not load."""
    kept: list[int] = []
    overlaps = iou(boxes, boxes)
    for i in scores.argsort(descending=True).tolist():
        if not (overlaps[i, kept] > threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long)


@pytest.mark.peers
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FasterRCNN", "RetinaNet"])
def test_a_detector_of_torchvision_takes_it_as_its_backbone(kind: str, monkeypatch: Any) -> None:
    """Anchors, proposals, pooling over levels and losses run, and the loss falls."""
    detection = pytest.importorskip("torchvision.models.detection")
    from torchvision import extension
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    if not extension._has_ops():
        monkeypatch.setattr("torchvision.ops.boxes.nms", plain_nms)
    backbone = randomise(Backbone.from_config(SMALL["dinov2"]))
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    name = {"FasterRCNN": "rpn_anchor_generator", "RetinaNet": "anchor_generator"}[kind]
    mean, std = backbone.preprocess.mean, backbone.preprocess.std  # type: ignore[union-attr]
    model: nn.Module = getattr(detection, kind)(
        Pyramid(backbone, 32),  # type: ignore[arg-type]
        num_classes=2, image_mean=mean, image_std=std, min_size=128, max_size=160, **{name: anchors},
    )  # fmt: skip
    image = torch.rand(3, 100, 130)
    truth = {"boxes": torch.tensor([[20.0, 30.0, 70.0, 80.0]]), "labels": torch.tensor([1])}
    solver = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(12):
        loss = sum(model([image], [truth]).values())
        solver.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        solver.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    assert set(model.eval()([image])[0]) == {"boxes", "labels", "scores"}
