"""Similarity to a part of an image: right values at the right positions."""

from typing import Any

import numpy as np
import pytest
import torch
from pictures import by_fit, complaint, photo
from repository import EXAMPLES

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks.similarity import patch_weights, region_vector, similarity_map

CAT = EXAMPLES / "cat.jpg"


@by_fit
def test_a_point_is_most_like_itself(fit: Any, size: int, bb: Backbone) -> None:
    """The map of a point is 1 at its patch and equals torch's cosines elsewhere; padding is -1."""
    features = bb.extract_features([photo(90, 130), photo(90, 130, seed=1)], size=size, fit=fit)
    vector = region_vector(features, point=(70, 50), index=1)
    maps = similarity_map(features, vector)
    row, column = features.to_patch(70, 50, index=1)
    assert maps.shape == (2, *features.grid) and maps[1, row, column] == pytest.approx(1, abs=1e-6)
    expected = torch.cosine_similarity(features.feature_map, vector[None, :, None, None], dim=1)
    valid = torch.ones_like(maps, dtype=torch.bool) if features.valid is None else features.valid
    assert torch.allclose(maps[valid], expected[valid], atol=1e-5) and (maps[~valid] == -1).all()


def test_boxes_and_masks_average_the_patches_they_hold(bb: Backbone) -> None:
    """Each patch has length 1 and is weighted by its covered share."""
    features = bb.extract_features(photo(96, 128), fit="native", size=128)
    tokens = torch.nn.functional.normalize(features.feature_map[0], dim=0)
    expected = torch.nn.functional.normalize(tokens[:, 1:3, 2:5].sum(dim=(1, 2)), dim=0)
    mask = np.zeros((96, 128), bool)
    mask[16:48, 32:80] = True
    for region in (dict(box=(32, 16, 80, 48)), dict(mask=mask), dict(mask=torch.from_numpy(mask))):
        assert torch.allclose(region_vector(features, **region), expected, atol=1e-6)
    mask[:, 40:] = False  # removes half of a column of patches
    assert torch.allclose(patch_weights(torch.from_numpy(mask), features.placements[0], (6, 8))[1], torch.eye(8)[2] / 2)


@by_fit
def test_weights_are_shares_of_patches(fit: Any, size: int, bb: Backbone) -> None:
    """A full mask covers every patch of the image; cropped and padded parts count nothing."""
    features = bb.extract_features(photo(90, 130), size=size, fit=fit)
    whole = patch_weights(torch.ones(90, 130), features.placements[0], features.grid)
    expected = torch.ones(features.grid) if features.valid is None else features.valid[0].float()
    assert torch.allclose(whole, expected, atol=1e-6)
    x, y = 66, 47
    dot = torch.zeros(90, 130)
    dot[y - 1 : y + 2, x - 1 : x + 2] = 1
    weights = patch_weights(dot, features.placements[0], features.grid)
    assert divmod(int(weights.argmax()), features.grid[1]) == features.to_patch(x + 0.5, y + 0.5)


@pytest.mark.parametrize(
    "region, said",
    [
        (dict(), "exactly one"), (dict(point=(1, 1), box=(0, 0, 2, 2)), "exactly one"),
        (dict(point=(200, 1)), "130 wide"), (dict(box=(5, 5, 5, 9)), "(left, top, right, bottom)"),
        (dict(box=(0, 0, 131, 9)), "130 x 90 pixels"), (dict(mask=np.ones((4, 4))), "mask is [4, 4]"),
        (dict(mask=np.zeros((90, 130))), "empty or was cropped away"), (dict(point=(60, 40), index=3), "number 3"),
        (dict(box=(0, 0, 3, 3)), "cropped away"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_regions_are_said(region: dict[str, Any], said: str, bb: Backbone) -> None:
    features = bb.extract_features(photo(90, 130), size=64, fit="crop")
    assert said in complaint(InputError, lambda: region_vector(features, **region))


def test_vectors_of_another_model_are_said(bb: Backbone) -> None:
    features = bb.extract_features(CAT, size=32)
    assert "patches have width 64" in complaint(InputError, lambda: similarity_map(features, torch.ones(32)))
