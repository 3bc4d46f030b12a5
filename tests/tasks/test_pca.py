"""Principal components: right values at the right positions."""

from typing import Any

import numpy as np
import pytest
import torch
from pictures import complaint
from repository import EXAMPLES

from dinov3_infer import Backbone, Features, InputError
from dinov3_infer.images.preprocess import Placement
from dinov3_infer.tasks.pca import foreground, pca_rgb, project

CAT = EXAMPLES / "cat.jpg"


def test_colours_are_joint_and_black_in_padding(bb: Backbone) -> None:
    """The same patches in two batches get the same colours, because the components are fitted to both."""
    padded, native = (bb.extract_features(CAT, fit=fit, size=224) for fit in ("pad", "native"))
    together, again = pca_rgb([padded, native]), pca_rgb([padded, native])
    assert [p.shape for p in together] == [(14, 14, 3), (9, 14, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))
    assert padded.valid is not None and not together[0][~padded.valid[0].numpy()].any()
    twice = pca_rgb([native, native])
    assert np.array_equal(*twice) and np.abs(twice[0].astype(int) - pca_rgb(native)[0]).max() < 4  # percentiles move


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    """With more tokens than channels, and with fewer, compared in float64."""
    for shape in ((300, 40), (40, 300)):
        tokens = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.1, shape[1]))
        u, s, _ = np.linalg.svd((tokens - tokens.mean(0)).double().numpy(), full_matrices=False)
        ours = project(tokens, 3).numpy()
        for i in range(3):
            assert abs(ours[:, i] @ u[:, i] / s[i]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300)], ids=str)
def test_signs_do_not_depend_on_what_the_solver_gives(shape: tuple[int, int], monkeypatch: Any) -> None:
    """Flipped eigenvectors give the same projection, and permuted rows give permuted results."""
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
    """Features with exactly these patches, [B, h, w, C]."""
    b, h, w, c = tokens.shape
    placement = placement or Placement((h * 16, w * 16), (h * 16, w * 16), (0, 0, h * 16, w * 16))
    flat = tokens.flatten(1, 2)
    return Features(flat[:, 0], flat[:, 0], flat[:, :0], flat, (h, w), (placement,) * b)


def test_foreground_is_the_side_away_from_the_border() -> None:
    """A square of one kind lies inside another kind, for both signs; patches outside the masks are black."""
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
        assert "masks are bool, one for each of 1 images" in complaint(InputError, lambda w=wrong: pca_rgb(features, w))
    nothing = [np.zeros((4, 6), bool)]
    assert "at least 3 patches, got 0" in complaint(InputError, lambda: pca_rgb(features, nothing))
    assert "no features; give" in complaint(InputError, lambda: pca_rgb([]))
