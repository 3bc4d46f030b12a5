"""Examples run as a newcomer would run them, and PCA pictures keep their promises."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_infer import Backbone, InputError
from dinov3_infer.tasks.pca import pca_picture, pca_rgb

ROOT = Path(__file__).parent.parent
CAT = ROOT / "examples" / "cat.jpg"


def test_quickstart(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", CAT, "", tmp_path / "pca.png"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        check=True,
    )
    assert "RANDOM WEIGHTS" in run.stdout and "[1, 384, 32, 48]" in run.stdout
    assert Image.open(tmp_path / "pca.png").size == (2 * 451 + 8, 300)


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return Backbone.from_config("nano", seed=0)


def test_colours_are_joint_stable_and_black_in_padding(nano: Backbone) -> None:
    padded = nano.extract_features(CAT, fit="pad", size=224)
    native = nano.extract_features(CAT, fit="native", size=224)
    together = pca_rgb([padded, native])
    again = pca_rgb([padded, native])
    assert [p.shape for p in together] == [(14, 14, 3), (9, 14, 3)]
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))
    assert padded.valid is not None and not together[0][~padded.valid[0].numpy()].any()
    # the same patches seen in both get the same colours, since the components are fitted to both
    assert np.abs(together[0][:9].astype(int) - together[1].astype(int)).mean() < 2


def test_components_are_those_of_a_singular_value_decomposition(nano: Backbone) -> None:
    features = nano.extract_features(CAT, fit="native", size=320)
    tokens = features.patch_tokens[0].double().numpy()
    u, s, _ = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)
    ours = pca_rgb(features)[0].reshape(-1, 3).astype(float)
    for channel in range(3):
        expected = u[:, channel] * s[channel]
        assert abs(np.corrcoef(ours[:, channel], expected)[0, 1]) > 0.97  # but for the clipped percentiles


def test_the_sheet_and_too_few_patches(nano: Backbone) -> None:
    sheet = pca_picture(Image.new("RGB", (60, 40)), np.zeros((4, 6, 3), np.uint8))
    assert sheet.size == (128, 40)
    with pytest.raises(InputError, match="at least 3 patches"):
        pca_rgb(nano.extract_features(torch.zeros(3, 16, 16), fit="native"))
    with pytest.raises(InputError, match="no features"):
        pca_rgb([])
