"""Tiles, scales, mirrored passes and upsamplers: right values at the right positions."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import SMALL
from pictures import complaint, photo
from torch import Tensor

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks import dense_features, pca_rgb, region_vector, similarity_map
from dinov3_infer.tasks.dense import _fade, _starts

PHOTO = photo(150, 230)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=1)


@pytest.mark.parametrize("size", [96, 160, None], ids=str)
def test_in_one_pass_it_is_extract_features(size: int | None, bb: Backbone) -> None:
    """Tokens and placement are equal bit for bit, also at the size of the image."""
    dense = dense_features(bb, PHOTO, size=size)
    plain = bb.extract_features(PHOTO, size=size, fit="native")
    assert dense.grid == plain.grid and dense.placements == plain.placements and dense.valid is None
    for name in ("patch_tokens", "cls_token", "register_tokens", "embedding"):
        assert torch.equal(getattr(dense, name), getattr(plain, name)), name


def test_layers_lie_side_by_side(bb: Backbone) -> None:
    plain = bb.extract_features(PHOTO, size=96, fit="native", layers=[0, 1])
    dense = dense_features(bb, PHOTO, size=96, layers=[0, 1])
    assert torch.equal(dense.patch_tokens, torch.cat([layer.patch_tokens for layer in plain.layers], dim=-1))
    assert torch.equal(dense.cls_token, torch.cat([layer.cls_token for layer in plain.layers], dim=-1))
    assert torch.equal(dense_features(bb, PHOTO, size=96, layers=[0]).patch_tokens, plain.layers[0].patch_tokens)


@pytest.mark.parametrize("overlap", [0.0, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("tile", [16, 48, 64, 512])
def test_tiles_meet_where_they_should(tile: int, overlap: float, local: Backbone) -> None:
    """With a local model, tiles give the same map as the whole image, without seams, shifts or missing borders."""
    whole = dense_features(local, PHOTO, size=224)
    tiled = dense_features(local, PHOTO, size=224, tile=tile, overlap=overlap)
    assert tiled.grid == whole.grid == (9, 14)
    assert torch.allclose(tiled.patch_tokens, whole.patch_tokens, atol=1e-4)


def test_tiles_see_their_window_only(bb: Backbone) -> None:
    """Without overlap each tile equals its window alone; with overlap its middle counts more than its rim."""
    pixels = torch.from_numpy(photo(64, 128)).permute(2, 0, 1)
    dense = dense_features(bb, pixels, size=None, tile=64, overlap=0.0)
    left, right = bb.extract_features([pixels[:, :, :64], pixels[:, :, 64:]], size=64)
    assert torch.allclose(dense.feature_map, torch.cat((left.feature_map, right.feature_map), dim=-1), atol=1e-5)
    assert torch.allclose(dense.cls_token, (left.cls_token + right.cls_token) / 2, atol=1e-5)
    three = dense_features(bb, pixels, size=None, tile=64, overlap=0.5)
    middle = bb.extract_features(pixels[:, :, 32:96], size=64).feature_map
    fade = _fade(4)
    weights = fade[2:] / (fade[2:] + fade[:2])
    expected = weights * left.feature_map[..., 2:] + (1 - weights) * middle[..., :2]
    assert torch.allclose(three.feature_map[..., 2:4], expected, atol=1e-5) and weights[0] > weights[1]


@pytest.mark.parametrize("length, side, overlap", [(10, 4, 0.5), (9, 4, 0.0), (4, 4, 0.5), (30, 7, 0.33), (5, 1, 0.9)])
def test_tiles_cover_everything(length: int, side: int, overlap: float) -> None:
    """There are as few tiles as possible with at least the overlap (to a patch); the last ends at the border."""
    starts = _starts(length, side, overlap)
    step = max(1, int(side * (1 - overlap)))
    assert starts[0] == 0 and starts[-1] == length - side and starts == sorted(set(starts))
    assert all(0 < b - a <= step for a, b in zip(starts, starts[1:], strict=False))
    assert (len(starts) - 2) * step < length - side or len(starts) == 1


def test_a_mirrored_pass_is_turned_back(bb: Backbone) -> None:
    """The average for the mirrored image is the mirrored average."""
    picture = torch.from_numpy(PHOTO).permute(2, 0, 1)
    plain = dense_features(bb, picture, size=224, flip=True).feature_map
    mirrored = dense_features(bb, picture.flip(-1), size=224, flip=True).feature_map
    assert torch.allclose(plain, mirrored.flip(-1), atol=1e-4)
    assert not torch.allclose(dense_features(bb, picture, size=224).feature_map, plain, atol=1e-2)


def test_scales_are_averaged_on_the_grid_of_the_first(local: Backbone) -> None:
    """Half and full size are averaged; where the image is smooth, both agree at each position."""
    y, x = np.mgrid[:128, :192].astype(np.float32)
    smooth = np.stack((x / 192, y / 128, (x + y) / 320), axis=-1)
    one, two = (dense_features(local, smooth, size=192, scales=scales) for scales in ((1.0,), (1.0, 0.5)))
    half = F.interpolate(local.extract_features(smooth, size=96, fit="native").feature_map, one.grid, mode="bilinear")
    assert two.grid == one.grid and torch.allclose(two.feature_map, (one.feature_map + half) / 2, atol=1e-4)
    assert cosines(one.feature_map, two.feature_map)[..., 1:-1, 1:-1].min() > 0.9


def test_a_filter_that_overshoots_does_no_harm(bb: Backbone) -> None:
    model = Backbone.from_config(SMALL["dinov3"])
    model.preprocess = replace(model.preprocess, filter="bicubic", engine="float")
    edges = np.kron(np.indices((10, 14)).sum(0) % 2, np.ones((16, 16)))[..., None].repeat(3, -1).astype(np.float32)
    assert dense_features(model, edges, size=192).patch_tokens.isfinite().all()


def test_an_upsampler_gets_the_map_and_the_image_and_gives_a_finer_map(bb: Backbone) -> None:
    """Functions that take features accept the result, and points still lead to the right position."""
    seen: list[tuple[Tensor, Tensor]] = []

    def guided(features: Tensor, image: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append((features, image))
        return F.interpolate(features, size=image.shape[2:], mode="bilinear")

    dense = dense_features(bb, PHOTO, size=160, tile=64, upsampler=guided)
    plain = dense_features(bb, PHOTO, size=160, tile=64)
    assert torch.equal(seen[0][0], plain.feature_map)
    pixels = bb.preprocess.with_options(160, "native")(PHOTO)
    assert torch.allclose(seen[0][1][0], pixels, atol=1e-6)  # normalised, as the model sees it
    assert dense.grid == (112, 160) and dense.feature_map.shape == (1, 64, 112, 160)
    assert dense.to_patch(229, 0) == (0, 159) and plain.to_patch(229, 0) == (0, 9)
    mask = np.zeros((150, 230), bool)
    mask[30:60, 100:140] = True
    maps = similarity_map(dense, region_vector(dense, mask=mask))
    assert maps.shape == (1, 112, 160) and pca_rgb(dense)[0].shape == (112, 160, 3)
    fine, coarse = maps[0], similarity_map(plain, region_vector(plain, mask=mask))
    assert (F.interpolate(coarse[None], size=(112, 160), mode="bilinear")[0, 0] - fine).abs().mean() < 0.1


WRONG: dict[str, tuple[Any, str]] = {
    "no tensor": (lambda f, i: None, "returned NoneType"),
    "other channels": (lambda f, i: f[:, :7], "returned [1, 7, 3, 4]; it has to return [1, 64, h, w]"),
    "coarser": (lambda f, i: f[..., :2], "returned [1, 64, 3, 2]"),
    "no batch": (lambda f, i: f[0], "returned [64, 3, 4]"),
    "not finite": (lambda f, i: f / 0, "not finite; run it in float32"),
}


@pytest.mark.parametrize("wrong, said", WRONG.values(), ids=WRONG)
def test_what_an_upsampler_gets_wrong_is_said(wrong: Any, said: str, bb: Backbone) -> None:
    assert said in complaint(InputError, lambda: dense_features(bb, PHOTO, size=64, upsampler=wrong))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(tile=50), "give a multiple of the patch, such as 48"), (dict(tile=0), "such as 16"),
        (dict(overlap=1.0), "overlap is a share of a tile, at least 0 and below 1"), (dict(overlap=-0.1), "got -0.1"),
        (dict(scales=()), "multiples of size, got []"), (dict(scales=(1, 0)), "got [1, 0]"),
        (dict(scales=(float("nan"),)), "got [nan]"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_said(options: dict[str, Any], said: str, bb: Backbone) -> None:
    assert said in complaint(InputError, lambda: dense_features(bb, PHOTO, **options))
