"""PCA, similarity and overlays: right numbers at the right place."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image
from repository import EXAMPLES

from dinov3_infer import Backbone, Features, InputError
from dinov3_infer.images.preprocess import Placement
from dinov3_infer.tasks.overlay import at_pixels, attention_picture, heat_colours, overlay, panel, sheet
from dinov3_infer.tasks.pca import foreground, pca_picture, pca_rgb, project
from dinov3_infer.tasks.similarity import patch_weights, region_vector, similarity_map

CAT = EXAMPLES / "cat.jpg"
FITS = [("squash", 64), ("crop", 64), ("pad", 96), ("native", 96)]
by_fit = pytest.mark.parametrize(("fit", "size"), FITS, ids=[fit for fit, _ in FITS])


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return randomise(Backbone.from_config(SMALL["dinov3"]))  # type: ignore[return-value]


# --- principal components -----------------------------------------------------------------------------------------


def test_colours_are_joint_and_black_in_padding(bb: Backbone) -> None:
    """The same patches seen in two batches get the same colours, since the components are fitted to both."""
    padded, native = (bb.extract_features(CAT, fit=fit, size=224) for fit in ("pad", "native"))
    together, again = pca_rgb([padded, native]), pca_rgb([padded, native])
    assert [p.shape for p in together] == [(14, 14, 3), (9, 14, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))
    assert padded.valid is not None and not together[0][~padded.valid[0].numpy()].any()
    twice = pca_rgb([native, native])
    assert np.array_equal(*twice) and np.abs(twice[0].astype(int) - pca_rgb(native)[0]).max() < 4  # percentiles move


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    """More tokens than channels, and fewer; by float64."""
    for shape in ((300, 40), (40, 300)):
        tokens = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.1, shape[1]))
        u, s, _ = np.linalg.svd((tokens - tokens.mean(0)).double().numpy(), full_matrices=False)
        ours = project(tokens, 3).numpy()
        for i in range(3):
            assert abs(ours[:, i] @ u[:, i] / s[i]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)], ids=str)
def test_signs_do_not_depend_on_what_the_solver_gives(shape: tuple[int, int], monkeypatch: Any) -> None:
    """Eigenvectors turned around give the same projection, and rows in another order the same rows."""
    tokens = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.1, shape[1]))
    plain, original = project(tokens, 3), torch.linalg.eigh
    order = torch.randperm(len(tokens))
    assert torch.allclose(project(tokens[order], 3), plain[order], atol=1e-4)

    def turned(matrix: torch.Tensor) -> Any:
        values, vectors = original(matrix)
        return values, vectors * torch.where(torch.arange(vectors.shape[1]) % 2 == 0, -1.0, 1.0)

    monkeypatch.setattr(torch.linalg, "eigh", turned)
    assert torch.allclose(project(tokens, 3), plain, atol=1e-4)


def painted(tokens: torch.Tensor, placement: Placement | None = None) -> Features:
    """Features that hold just these patches, [B, h, w, C]."""
    b, h, w, c = tokens.shape
    placement = placement or Placement((h * 16, w * 16), (h * 16, w * 16), (0, 0, h * 16, w * 16))
    flat = tokens.flatten(1, 2)
    return Features(flat[:, 0], flat[:, 0], flat[:, :0], flat, (h, w), (placement,) * b)


def test_foreground_is_the_side_away_from_the_border() -> None:
    """A square of one kind in the middle of another, at whatever sign; masks leave the others black."""
    for sign in (1.0, -1.0):
        tokens = 0.1 * torch.randn(2, 8, 10, 16)
        tokens[..., 3] -= sign
        tokens[0, 2:6, 3:8, 3] += 2 * sign
        tokens[1, 4:7, 1:4, 3] += 2 * sign
        features = painted(tokens)
        masks = foreground(features)
        expected = np.zeros((2, 8, 10), bool)
        expected[0, 2:6, 3:8] = expected[1, 4:7, 1:4] = True
        assert np.array_equal(masks, expected)
        colours = np.array(pca_rgb(features, masks))
        assert not colours[~expected].any() and colours[expected].any()
        red = np.array(pca_rgb(features))[..., 0].astype(int)
        assert red[expected].min() > red[~expected].max()


def test_wrong_masks_and_too_few_patches_are_said(bb: Backbone) -> None:
    features = bb.extract_features(CAT, fit="native", size=96)
    for wrong in ([np.ones((4, 6))], [np.ones((5, 6), bool)], []):
        assert "masks are bool, one for each of 1 pictures" in complaint(
            InputError, lambda w=wrong: pca_rgb(features, w)
        )
    nothing = [np.zeros((4, 6), bool)]
    assert "at least 3 patches, got 0" in complaint(InputError, lambda: pca_rgb(features, nothing))
    assert "no features; give" in complaint(InputError, lambda: pca_rgb([]))


# --- similarity -----------------------------------------------------------------------------------------------------


@by_fit
def test_a_point_is_most_like_itself(fit: Any, size: int, bb: Backbone) -> None:
    """The map of a point has 1 at its patch, and cosines of torch elsewhere; padding can never be found."""
    features = bb.extract_features([photo(90, 130), photo(90, 130, seed=1)], size=size, fit=fit)
    vector = region_vector(features, point=(70, 50), index=1)
    maps = similarity_map(features, vector)
    row, column = features.to_patch(70, 50, index=1)
    assert maps.shape == (2, *features.grid) and maps[1, row, column] == pytest.approx(1, abs=1e-6)
    expected = torch.cosine_similarity(features.feature_map, vector[None, :, None, None], dim=1)
    valid = torch.ones_like(maps, dtype=torch.bool) if features.valid is None else features.valid
    assert torch.allclose(maps[valid], expected[valid], atol=1e-5) and (maps[~valid] == -1).all()


def test_boxes_and_masks_average_the_patches_they_hold(bb: Backbone) -> None:
    """Each patch at length 1, by the share that is covered."""
    features = bb.extract_features(photo(96, 128), fit="native", size=128)
    tokens = torch.nn.functional.normalize(features.feature_map[0], dim=0)
    expected = torch.nn.functional.normalize(tokens[:, 1:3, 2:5].sum(dim=(1, 2)), dim=0)
    mask = np.zeros((96, 128), bool)
    mask[16:48, 32:80] = True
    for region in (dict(box=(32, 16, 80, 48)), dict(mask=mask), dict(mask=torch.from_numpy(mask))):
        assert torch.allclose(region_vector(features, **region), expected, atol=1e-6)
    mask[:, 40:] = False  # half of a column of patches
    assert torch.allclose(patch_weights(torch.from_numpy(mask), features.placements[0], (6, 8))[1], torch.eye(8)[2] / 2)


@by_fit
def test_weights_are_shares_of_patches(fit: Any, size: int, bb: Backbone) -> None:
    """Everything covers every patch of picture; what is cut away or padded counts nothing."""
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
        (dict(box=(0, 0, 131, 9)), "130 wide and 90 high"), (dict(mask=np.ones((4, 4))), "mask is [4, 4]"),
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
    assert "patches have 64 numbers" in complaint(InputError, lambda: similarity_map(features, torch.ones(32)))


# --- overlays -------------------------------------------------------------------------------------------------------


def oklab(colours: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 sRGB -> OKLab, by the matrices from sRGB (those in the package lead to it)."""
    c = colours / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    cones = linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619], [0.5363325363, 0.6806995451, 0.2817188376],
                               [0.0514459929, 0.1073969566, 0.6299787005]])  # fmt: skip
    return np.cbrt(cones) @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                                      [0.7936177850, -2.4285922050, 0.7827717662],
                                      [-0.0040720468, 0.4505937099, -0.8086757660]])  # fmt: skip


def test_colours_are_even_to_the_eye() -> None:
    """Ever lighter, and no step of eight far from the mean one: the rest is rounding to bytes."""
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
def test_maps_lie_where_the_picture_is(fit: Any, size: int, bb: Backbone) -> None:
    """The value at a pixel is that of the patch `to_patch` names, whatever the fit; cropped parts are NaN."""
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
    """Few empty places, never too wide, captions below."""
    picture = Image.new("RGB", (100, 60), "red")
    sizes = {n: sheet([picture] * n).size for n in (1, 2, 3, 4, 8, 14)}
    assert sizes == {1: (116, 76), 2: (224, 76), 3: (332, 76), 4: (224, 144), 8: (440, 144), 14: (548, 212)}
    assert sheet([picture], ["cat"]).size[1] > 76 and sheet([picture] * 3, columns=1).size == (116, 212)
    assert sheet([Image.new("RGB", (1024, 1024))] * 34).width <= 4096 + 8
    last = np.asarray(sheet([picture] * 7, columns=4))[76:, :, 1].min(axis=0) == 0  # red, in the second row
    assert np.array_equal(last, last[::-1]) and last.sum() == 300 and not last[:58].any()
    assert "at least one" in complaint(InputError, lambda: sheet([]))


def test_pictures_of_every_kind(bb: Backbone) -> None:
    """From a path, with what the model gives."""
    features = bb.extract_features(CAT, size=96, fit="crop")
    picture = pca_picture(CAT, pca_rgb(features)[0], features.placements[0])
    assert picture.size == (1048, 357) and not np.asarray(picture)[100, 540:550].any()  # cropped away: black
    maps = bb.attention_maps(CAT, query=(300, 100), size=96)
    assert attention_picture(CAT, maps[0], mark=(300, 100)).size == (3 * (512 + 8) + 8, 2 * (341 + 8 + 27) + 8)
    assert "[2, 4, 6]" in complaint(InputError, lambda: overlay(CAT, torch.zeros(2, 4, 6)))
    assert "one picture" in complaint(InputError, lambda: attention_picture(CAT, maps))
    assert replace(features).placements == features.placements
