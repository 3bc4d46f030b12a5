"""Overlays and sheets: right values at the right positions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pictures import by_fit, complaint, photo
from PIL import Image
from repository import EXAMPLES

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks.overlay import (
    _without_middle,
    at_pixels,
    attention_picture,
    heat_colours,
    overlay,
    panel,
    sheet,
)
from dinov3_infer.tasks.pca import pca_picture, pca_rgb
from dinov3_infer.tasks.similarity import region_vector, similarity_map, similarity_picture

CAT = EXAMPLES / "cat.jpg"


def oklab(colours: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 sRGB to OKLab, by the matrices for linear sRGB."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
                               [0.0514459929, 0.1073969566, 0.6299787005]])  # fmt: skip
    return np.cbrt(cones) @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                                      [0.7936177850, -2.4285922050, 0.7827717662],
                                      [-0.0040720468, 0.4505937099, -0.8086757660]])  # fmt: skip


def test_colours_are_even_to_the_eye() -> None:
    """Lightness always rises, and steps of eight colours have nearly equal size."""
    lab = oklab(heat_colours())
    steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)
    assert heat_colours().shape == (256, 3) and (np.diff(lab[::4, 0]) > 0).all()
    assert steps.max() / steps.min() < 1.15 and lab[-1, 0] - lab[0, 0] > 0.7


def test_values_at_pixels_are_cubic_between_patches() -> None:
    """A ramp stays a ramp away from the border, and a patch keeps its value at its centre."""
    ramp = torch.arange(8.0).expand(6, 8)
    found = at_pixels(ramp[None], None, (60, 80))[0]
    assert torch.allclose(found[30, 20:60], torch.arange(20, 60) / 10 + 0.05 - 0.5, atol=1e-5)
    noise = torch.randn(6, 8)
    assert torch.allclose(at_pixels(noise[None], None, (66, 88))[0, 5::11, 5::11], noise, atol=1e-5)


@by_fit
def test_maps_lie_where_the_image_is(fit: Any, size: int, bb: Backbone) -> None:
    """The value at a pixel is that of the patch that `to_patch` names, for each fit; cropped parts are NaN."""
    features = bb.extract_features(photo(90, 130), size=size, fit=fit)
    h, w = features.grid
    rows = torch.arange(float(h))[:, None].expand(h, w)
    columns = torch.arange(float(w)).expand(h, w)
    found = at_pixels(torch.stack((rows, columns)), features.placements[0], (180, 260))  # twice the size
    for x, y in [(1, 1), (128, 1), (1, 88), (128, 88), (65, 45), (40, 70), (90, 20)]:
        try:
            patch = features.to_patch(x, y)
        except InputError:
            assert fit == "crop" and found[:, 2 * y, 2 * x].isnan().all()
            continue
        assert (found[:, 2 * y, 2 * x] - torch.tensor(patch)).abs().max() <= 0.75


def test_overlay_shows_high_values_bright_and_marks_the_point() -> None:
    picture, values = Image.new("RGB", (640, 480), (90, 90, 90)), torch.zeros(6, 8)
    values[4, 1] = 1.0
    shown = overlay(picture, values)
    light = np.asarray(shown.convert("L")).astype(int)
    assert shown.size == picture.size and np.unravel_index(light.argmax(), light.shape)[0] // 80 == 4
    assert light[360, 120] > light[100, 500] + 80
    marked = np.abs(np.asarray(overlay(picture, values, mark=(500, 100))).astype(int) - np.asarray(shown)).sum(axis=-1)
    assert marked[80:121, 480:521].max() > 100 and not marked[200:].any() and not marked[:, :400].any()
    flat = overlay(picture, torch.ones(6, 8))  # no range at all
    assert np.ptp(np.asarray(flat).reshape(-1, 3), axis=0).max() <= 8
    fixed = [np.asarray(overlay(picture, values * k, limits=(0, 10))) for k in (1, 10)]
    assert fixed[0].max() < fixed[1].max()


@pytest.mark.parametrize(
    "size, shown",
    [((100, 50), (512, 256)), ((600, 800), (600, 800)), ((4000, 2000), (1024, 512)), ((1, 3000), (1, 1024))],
)
def test_panels_are_of_a_size_to_look_at(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert panel(Image.new("RGB", size)).size == shown


def test_sheets() -> None:
    """A sheet has few empty places, a limited width, and captions below the images."""
    picture = Image.new("RGB", (100, 60), "red")
    sizes = {n: sheet([picture] * n).size for n in (1, 2, 3, 4, 8, 14)}
    assert sizes == {1: (116, 76), 2: (224, 76), 3: (332, 76), 4: (224, 144), 8: (440, 144), 14: (548, 212)}
    assert sheet([picture], ["cat"]).size[1] > 76 and sheet([picture] * 3, columns=1).size == (116, 212)
    assert sheet([Image.new("RGB", (1024, 1024))] * 34).width <= 4096 + 8
    last = np.asarray(sheet([picture] * 7, columns=4))[76:, :, 1].min(axis=0) == 0  # red, in the second row
    assert np.array_equal(last, last[::-1]) and last.sum() == 300 and not last[:58].any()
    assert "at least one" in complaint(InputError, lambda: sheet([]))


def test_sheets_are_aligned_and_captions_fit() -> None:
    """A narrow image is centred in its place; a long caption keeps both ends."""
    wide, narrow = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (50, 100), "blue")
    made = np.asarray(sheet([wide, narrow], ["a" * 300, "b"], columns=1))
    blue = np.flatnonzero((made[:, :, 2] > 200) & (made[:, :, 0] < 50))
    columns = np.unique(blue % made.shape[1])
    assert (columns[0], columns[-1]) == (8 + 75, 8 + 75 + 49)
    text = (made[108:128] < 128).all(-1).any(0)
    assert text.any() and np.flatnonzero(text)[-1] < 8 + 200
    assert _without_middle("abcdefgh", 5) == "abc…gh" and _without_middle("abc", 5) == "abc"


def test_images_of_every_kind(bb: Backbone) -> None:
    """The image is a path, the maps come from the model."""
    features = bb.extract_features(CAT, size=96, fit="crop")
    picture = pca_picture(CAT, pca_rgb(features)[0], features.placements[0])
    assert picture.size == (1048, 357) and not np.asarray(picture)[100, 540:550].any()  # cropped away: black
    maps = bb.attention_maps(CAT, query=(300, 100), size=96)
    assert attention_picture(CAT, maps[0], mark=(300, 100)).size == (3 * (512 + 8) + 8, 2 * (341 + 8 + 27) + 8)
    assert "[2, 4, 6]" in complaint(InputError, lambda: overlay(CAT, torch.zeros(2, 4, 6)))
    assert replace(features).placements == features.placements


@pytest.mark.parametrize("fit, size", [("native", 160), ("squash", 96), ("crop", 96), ("pad", 160)])
def test_one_call_shows_an_image(fit: Any, size: int, bb: Backbone) -> None:
    """`pca_picture` and `similarity_picture` take features and use their placement."""
    found = bb.extract_features(CAT, size=size, fit=fit)
    by_hand = pca_picture(CAT, pca_rgb(found)[0], found.placements[0])
    assert (np.asarray(pca_picture(CAT, found)) == np.asarray(by_hand)).all()
    point = (300.0, 200.0)
    vector = region_vector(found, point=point)
    expected = overlay(CAT, similarity_map(found, vector)[0], found.placements[0], mark=point)
    shown = similarity_picture(CAT, found, point)
    assert (np.asarray(shown) == np.asarray(sheet([panel(CAT), expected], columns=2))).all()
    assert similarity_picture(CAT, found, vector=vector).size == shown.size
    maps = bb.attention_maps(CAT, size=size, fit="native")
    assert (np.asarray(attention_picture(CAT, maps)) == np.asarray(attention_picture(CAT, maps[0]))).all()


def test_what_cannot_be_shown_is_said(bb: Backbone) -> None:
    found = bb.extract_features([CAT, CAT], size=64)
    for draw in (pca_picture, lambda image, features: similarity_picture(image, features, (1, 1))):
        assert "got features of 2 images" in complaint(InputError, lambda d=draw: d(CAT, found))  # type: ignore[misc]
        said = complaint(InputError, lambda d=draw: d(photo(64, 96), found[0]))  # type: ignore[misc]
        assert "the image is 96 x 64 pixels, but the features are of an image of" in said
    assert "give exactly one" in complaint(InputError, lambda: similarity_picture(CAT, found[0]))
    both = lambda: similarity_picture(CAT, found[0], (1, 1), vector=found.cls_token[0])  # noqa: E731
    assert "give exactly one" in complaint(InputError, both)
    assert "attention_picture takes the maps of one" in complaint(
        InputError, lambda: attention_picture(CAT, torch.ones(2, 3, 4, 4))
    )
