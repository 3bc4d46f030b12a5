"""examples/CHOOSING.md shows its record, and its half-patch shift is right."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from oracles import SMALL, randomise
from pictures import photo
from repository import benchmarks_importable

from dinov3_infer import Backbone
from dinov3_infer.tasks import at_pixels


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with benchmarks_importable():
        yield import_module("choosing")


def test_the_page_shows_the_record(script: Any) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.filled(text, script.recorded()) == text, "run python tests/benchmarks/choosing.py --render"


def test_tables_of_a_record(script: Any) -> None:
    scores = {p: {"knn": 0.5, "linear": 0.6} for p in script.POOLINGS}
    record = {
        "model": "some_model", "fingerprint": "f" * 64, "train": 3000, "test": 1000, "pairs": 60,
        "cells": {
            "classification, 8 patches a side": {"11": scores},
            "segmentation, 32 patches a side": {"11": [0.4, 0.6], "last 4": [0.5, 0.7]},
            "segmentation, 32, and mirrored": {"11": [0.45, 0.65], "last 4": [0.4, 0.7]},
        },
    }  # fmt: skip
    text = script.filled(script.PAGE.read_text(encoding="utf-8"), record)
    assert "(ffffffffffff), 3,000 + 1,000 images" in text and "| 8 | 11 | 0.500 | 0.600 |" in text
    assert "accuracy ± 0.016 at most" in text
    assert "| input | layer 11 | last 4 |" in text and "| 32 patches a side | 0.500 ± 0.100 | 0.600 ± 0.100 |" in text
    assert "| 32, and mirrored | 0.550 ± 0.100 (+0.050 ± 0.000) | 0.550 ± 0.150 (-0.050 ± 0.050) |" in text
    assert script.filled(text, {}).count("Not measured yet.") == 2


def test_a_shift_by_half_a_patch_leads_back(script: Any) -> None:
    """Patches of both passes hold the pixels that their placement states: brightness returns to its position."""
    bb = randomise(Backbone.from_config(SMALL["dinov2"]))
    picture = photo(100, 100)
    straight, moved = script.shifted(bb, picture, [1])
    assert straight.grid == (32, 32) and moved.grid == (33, 33)
    y, x = 40.0, 60.0
    row, column = moved.to_patch(x, y)
    assert (row, column) == (int((y * 4.48 + 7) // 14), int((x * 4.48 + 7) // 14))
    ramp = torch.arange(33.0).expand(33, 33)[None]
    found = at_pixels(ramp, moved.placements[0], (100, 100))[0, 50]
    expected = ((torch.arange(100) + 0.5) * 4.48 + 7) / 14 - 0.5
    assert torch.allclose(found[5:95], expected[5:95], atol=1e-4) and found.isfinite().all()
