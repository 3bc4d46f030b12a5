"""Files of fitted objects: shapes, dtypes and settings have to be those that `fit` and the constructor make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dinov3_infer import Backbone, CheckpointError
from dinov3_infer.tasks import KNN, AttentiveProbe, LinearProbe, LogisticProbe, OneShotSegmenter, SegmentationHead
from dinov3_infer.tasks.classifier import Probe
from dinov3_infer.tasks.fitted import Fitted

WIDTH, CLASSES = 192, 3
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return Backbone.from_pretrained("nano", device="cpu")


def _made(kind: Fitted, **tensors: Tensor) -> Fitted:
    kind.tensors = tensors
    if isinstance(kind, Probe):
        kind.classes_ = np.arange(CLASSES)
    return kind


WEIGHT, BIAS, ONE = torch.randn(CLASSES, WIDTH), torch.randn(CLASSES), torch.ones(1)
FITTED: dict[str, Fitted] = {
    "knn": _made(KNN(k=2), features=torch.randn(9, WIDTH), targets=torch.arange(9) % CLASSES),
    "linear": _made(LinearProbe(steps=9), weight=WEIGHT, bias=BIAS, learning_rate=ONE),
    "logistic": _made(LogisticProbe(), weight=WEIGHT, bias=BIAS, strength=ONE),
    "attentive": _made(
        AttentiveProbe(), query=torch.randn(8, WIDTH), value=torch.randn(8, WIDTH // 8, WIDTH), norm=torch.ones(WIDTH),
        shift=torch.zeros(WIDTH), weight=WEIGHT, bias=BIAS, learning_rate=ONE,
    ),
    "one shot": _made(OneShotSegmenter(), prototypes=WEIGHT),
    "head": _made(SegmentationHead(), weight=WEIGHT, bias=BIAS),
}  # fmt: skip


def changed(path: Path, change: Callable[[State], Any], **stored: Any) -> None:
    """The file with other tensors or other entries."""
    with safe_open(path, "pt") as file:
        beside = json.loads(file.metadata()["dinov3_infer"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, {"dinov3_infer": json.dumps(beside | stored)})


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "an axis more": lambda t: t[None],
    "an axis less": lambda t: t.flatten()[0] if t.ndim == 1 else t[0],
    "turned": lambda t: t.mT if t.ndim > 1 else t[:, None],
    "nothing": lambda t: t[:0],
    "one more": lambda t: torch.cat((t, t[:1])),
    "wider": lambda t: torch.cat((t, t), -1),
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "NaN": lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t - 9,
    "infinite": lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t + 2**40,
}


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("change", TENSORS)
def test_tensors_are_those_that_fit_makes(change: str, kind: str, bb: Backbone, tmp_path: Path) -> None:
    """Each tensor of each class is changed separately."""
    learnt = FITTED[kind]
    single = len(learnt.names) == 1
    for name in learnt.names:
        path = learnt.save(tmp_path / "x", bb)
        assert type(learnt).load(path, bb).names == learnt.names
        if (single and change in ("turned", "one more", "wider")) or (change == "wider" and kind != "attentive"):
            continue  # no other tensor fixes the length of that axis
        changed(path, lambda tensors, name=name: tensors.update({name: TENSORS[change](tensors[name]).contiguous()}))
        text = complaint(CheckpointError, lambda path=path: type(learnt).load(path, bb))
        assert "which save() does not write" in text and name.split()[0] in text or len(learnt.names) > 1, text


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("value", [None, "x", True, [], {}, [1, "x"], 10**400, 1e300, [[1]]], ids=repr)
def test_settings_are_those_that_the_constructor_takes(value: Any, kind: str, bb: Backbone, tmp_path: Path) -> None:
    learnt = FITTED[kind]
    for name, known in learnt.settings().items():
        if value is None and known is None:
            continue
        path = learnt.save(tmp_path / "x", bb)
        changed(path, lambda tensors: None, settings=learnt.settings() | {name: value})
        assert "save()" in complaint(CheckpointError, lambda path=path: type(learnt).load(path, bb))


@pytest.mark.parametrize(
    "beside", ["[" * 100_000, "null", "3", '"x"', "{}", '{"kind": []}', '{"kind": {}, "settings": 3}', "NaN", ""]
)
def test_entries_that_are_none(beside: str, bb: Backbone, tmp_path: Path) -> None:
    save_file({"features": torch.ones(2, 2)}, tmp_path / "x", {"dinov3_infer": beside})
    complaint(CheckpointError, lambda: Fitted.load(tmp_path / "x", bb))


def test_heads_that_do_not_fit(bb: Backbone, tmp_path: Path) -> None:
    path = FITTED["attentive"].save(tmp_path / "x", bb)
    changed(path, lambda tensors: tensors.update(value=torch.randn(8, 5, WIDTH)))
    assert "8 heads of 5 channels" in complaint(CheckpointError, lambda: AttentiveProbe.load(path, bb))


@pytest.mark.parametrize("classes", [[0, 1], [0, 1, 2, 3], [], ["a", "a", "b"], [2, 1, 0], [[0], [1]], "abc", None, 3])
def test_classes_are_as_many_as_the_tensors_have(classes: Any, bb: Backbone, tmp_path: Path) -> None:
    for kind in ("knn", "linear", "attentive"):
        path = FITTED[kind].save(tmp_path / "x", bb)
        changed(path, lambda tensors: None, classes=classes)
        if kind == "knn" and classes == [0, 1, 2, 3]:
            continue  # the last class may have no example
        complaint(CheckpointError, lambda path=path: Fitted.load(path, bb))
