"""The table of examples/README.md: its measures by formula, its verdicts, and its match with the record."""

import importlib
import json
from typing import Any

import pytest
import torch
from repository import BENCHMARKS, ROOT

RESULTS = BENCHMARKS / "tasks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module


def test_the_readme_shows_the_record(script: Any) -> None:
    run = script("run")
    record = json.loads(run.RECORD.read_text()) if run.RECORD.exists() else {}
    shown = run.README.read_text(encoding="utf-8").split(run.BEGIN)[1].split(run.END)[0]
    assert shown.strip() == run.table(record), "run python tests/benchmarks/tasks/run.py --table"


def test_every_task_has_a_function_and_every_image_is_shown_and_small(script: Any) -> None:
    run = script("run")
    source = (RESULTS / "tasks.py").read_text(encoding="utf-8")
    assert all(f"def {task.function}(" in source for task in run.TASKS.values())
    text, pictures = run.README.read_text(encoding="utf-8"), sorted((ROOT / "examples" / "pictures").iterdir())
    assert all(f"pictures/{path.name}" in text for path in pictures)
    assert all(path.stat().st_size < 150_000 for path in pictures)
    assert sum(path.stat().st_size for path in pictures) < 2_000_000


@pytest.mark.parametrize(
    "real, other, expected",
    [
        ([0.5, 0.6, 0.7], [0.3, 0.4, 0.5], "passed"),
        ([0.5, 0.6, 0.7], [0.41, 0.51, 0.61], "+0.090 ± 0.000 over random"),
        ([0.9, 0.6, 0.7], [0.3, 0.5, 0.6], "+0.267 ± 0.167 over random"),
        ([0.2, 0.2, 0.2], [0.0, 0.0, 0.0], "below 0.3"),
    ],
    ids=["passed", "margin", "noise", "floor"],
)
def test_verdicts(real: list[float], other: list[float], expected: str, script: Any) -> None:
    run = script("run")
    values = {"real": real, "random": other, "pixels": [0.0, 0.0, 0.0]}
    found = run.verdict(
        run.Task("f", "by", "pictures", "measure", floor=0.3 if expected == "below 0.3" else 0.0), values
    )
    assert found == expected
    runs = {model: {str(i): {"value": v} for i, v in enumerate(each)} for model, each in values.items()}
    assert f"| {expected} |" in run.table({"k-NN": runs}) or expected == "below 0.3"
    assert "| not measured |" in run.table({"k-NN": {"real": runs["real"]}})


def test_panoptic_quality_by_hand(script: Any) -> None:
    """A match of 3/4 counts; an overlap of 1/4 is a false and a missed segment: 0.75 / 2; class 0 is missed."""
    masks = torch.zeros(5, 4, 4, dtype=torch.bool)
    masks[0, 0], masks[1, 0, :3], masks[2, 1, :1], masks[3, 1], masks[4, 2] = True, True, True, True, True
    truth = [(masks[[0, 3, 4]], torch.tensor([1, 1, 0]))]
    found = [(masks[[1, 2]], torch.tensor([1, 1]))]
    assert script("metrics").panoptic_quality(found, truth) == pytest.approx((0.75 / 2 + 0) / 2)
    assert script("metrics").panoptic_quality(truth, truth) == 1


def test_region_and_contour(script: Any) -> None:
    metrics = script("metrics")
    truth = torch.zeros(200, 300, dtype=torch.bool)
    truth[50:150, 100:200] = True
    assert metrics.contour(truth).sum() == 4 * 99
    assert metrics.region_and_contour(truth, truth) == 1
    near, far = truth.roll(2, 1), truth.roll(20, 1)  # the contour may be 3 pixels away
    assert metrics.region_and_contour(near, truth) == pytest.approx((98 / 102 + 1) / 2)
    share = 94 / 106
    assert share / 2 < metrics.region_and_contour(truth.roll(6, 1), truth) < (share + 0.7) / 2
    share = 80 / 120
    assert share / 2 < metrics.region_and_contour(far, truth) < (share + 0.6) / 2
    assert metrics.region_and_contour(~truth & False, truth) == 0


def test_inliers_of_two_views_of_points_in_space(script: Any) -> None:
    """All pairs of two exact views are inliers; with 40 % shuffled, about the rest."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(60, 3, generator=generator) * torch.tensor([2.0, 2.0, 2.0]) + torch.tensor([-1.0, -1.0, 3.0])
    turn = torch.tensor([[0.96, 0.0, 0.28], [0.0, 1.0, 0.0], [-0.28, 0.0, 0.96]])
    here, there = ((p[:, :2] / p[:, 2:] + 1) * 300 for p in (points, points @ turn.T + torch.tensor([-0.8, 0.1, 0.2])))
    inliers = script("metrics").epipolar_inliers
    assert inliers(here, there, 1.0, 0, rounds=20) == 1
    there[:24] = there[:24].roll(7, 0)
    assert 0.6 <= inliers(here, there, 1.0, 0, rounds=300) < 0.85
