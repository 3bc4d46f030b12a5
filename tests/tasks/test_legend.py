"""Depth and classes beside their image: colours where they belong, a scale and a legend that say what they are."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_infer import InputError
from dinov3_infer.released.segments import SegmentMap
from dinov3_infer.tasks import depth_picture, panel, segments_picture
from dinov3_infer.tasks.overlay import GAP, heat_colours

IMAGE = np.full((300, 600, 3), 90, np.uint8)


def halves(picture: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The photograph, the map beside it, and all that is below."""
    found, shown = np.asarray(picture), panel(IMAGE)
    width, height = shown.size
    assert picture.width == 2 * width + 3 * GAP
    left, right = (found[GAP : GAP + height, x : x + width] for x in (GAP, 2 * GAP + width))
    np.testing.assert_array_equal(left, np.asarray(shown))
    return left, right, found[height + 2 * GAP :]


def test_depth_goes_from_the_first_colour_to_the_last() -> None:
    depth = torch.linspace(1.0, 5.0, 600).expand(300, 600)
    _, shown, below = halves(depth_picture(IMAGE, depth))
    colours = heat_colours()
    np.testing.assert_array_equal(shown[10, 0], colours[0])
    np.testing.assert_array_equal(shown[10, -1], colours[255])
    assert np.abs(shown[10, shown.shape[1] // 2].astype(int) - colours[128]).max() <= 3
    bar = below[5, GAP:-GAP]
    assert np.abs(bar[0].astype(int) - colours[0]).max() <= 3 and np.abs(bar[-1].astype(int) - colours[255]).max() <= 3
    assert (below[-30:] < 128).any(), "numbers below the bar"
    _, shown, _ = halves(depth_picture(IMAGE, depth, limits=(1.0, 9.0)))
    assert np.abs(shown[10, -1].astype(int) - colours[128]).max() <= 3
    _, shown, _ = halves(depth_picture(IMAGE, np.full((300, 600), 2.0, np.float32)))
    assert (shown == colours[0]).all(), "a flat depth is one colour"


def segments(labels: torch.Tensor) -> SegmentMap:
    return SegmentMap(labels, ("sky", "road", "car"), ((0, 0, 255), (255, 0, 0), (0, 255, 0)))


def test_classes_have_their_colours_and_a_legend() -> None:
    """In the legend the largest comes first, and what covers next to nothing is not there."""
    labels = torch.zeros(300, 600, dtype=torch.int64)
    labels[:, 200:] = 1
    labels[0, 0] = 2
    _, shown, below = halves(segments_picture(IMAGE, segments(labels)))
    expected = 0.35 * 90 + 0.65 * np.array([0, 0, 255])
    assert np.abs(shown[50, 20] - expected).max() <= 1
    assert np.abs(shown[50, -20] - (0.35 * 90 + 0.65 * np.array([255, 0, 0]))).max() <= 1
    places = [np.argwhere((below == colour).all(axis=-1)) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    assert len(places[0]) > 50 and len(places[1]) > 50 and not len(places[2])
    assert places[0][:, 1].max() < places[1][:, 1].min(), "the road before the sky"


def test_a_long_legend_has_rows() -> None:
    labels = torch.arange(12).repeat_interleave(50).expand(300, 600)
    colours = tuple((20 * i, 255 - 20 * i, 7) for i in range(12))
    names = tuple(f"a class with a long name {i}" for i in range(12))
    _, _, below = halves(segments_picture(IMAGE, SegmentMap(labels, names, colours)))
    rows = {tuple(np.argwhere((below == colour).all(axis=-1)).mean(axis=0).round()) for colour in colours}
    assert len(rows) == 12 and 1 < len({y for y, _ in rows}) < 12


def test_of_another_image() -> None:
    with pytest.raises(InputError, match=r"the depths are \[30, 60\] and the image \[300, 600\]"):
        depth_picture(IMAGE, torch.ones(30, 60))
    with pytest.raises(InputError, match=r"the labels are \[1, 300, 600\] and the image"):
        segments_picture(IMAGE, segments(torch.zeros(1, 300, 600, dtype=torch.int64)))
