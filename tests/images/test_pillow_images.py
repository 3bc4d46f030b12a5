"""The images of Pillow's own tests give Pillow's pixels or an error."""

import logging
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fetch import PILLOW, wheel_path
from PIL import Image, ImageOps

from dinov3_infer import load_image
from dinov3_infer.errors import Dinov3Error
from dinov3_infer.images.deep import is_deep
from dinov3_infer.images.paths import FORMATS

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pillow")
    with tarfile.open(wheel_path(PILLOW)) as archive:
        archive.extractall(place, (m for m in archive if "/Tests/images/" in m.name), filter="data")
    return place


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def pixels_of_pillow(path: Path) -> np.ndarray | None:
    """Upright RGB over white; None for files that are no supported image, or have more than 8 bits."""
    with Image.open(path) as opened:
        if opened.format not in (*FORMATS, "MPO") or is_deep(opened):
            return None
        opened.load()
        image: Any = ImageOps.exif_transpose(opened)
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def test_the_images_of_pillows_tests(folder: Path) -> None:
    count: Counter[str] = Counter()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            found = load_image(path).permute(1, 2, 0).numpy()
        except Dinov3Error as error:
            count["refused"] += 1
            assert "\n" not in str(error) and path.name in str(error), path
            found = None
        try:
            wanted = pixels_of_pillow(path)
        except Exception:  # Pillow's readers of damaged files raise anything
            assert found is None, path
            continue
        if wanted is None:
            assert found is None, path
            continue
        assert found is not None and np.array_equal(found, wanted), path
        count["same"] += 1
    assert count["same"] > 650 and count["refused"] > 300, count


def test_deep_ones_become_right_with_levels(folder: Path) -> None:
    """Each image is scaled by its own values, compared with numpy on Pillow's values."""
    count = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            with Image.open(path) as opened:
                if not is_deep(opened) or opened.format not in FORMATS:
                    continue
                opened.load()
                values = np.asarray(ImageOps.exif_transpose(opened)).astype(np.float64)
        except Exception:
            continue
        low, high = float(values.min()), float(values.max())
        if low == high:
            continue
        found = load_image(path, levels=(low, high))[0].numpy()
        white_is_zero = getattr(opened, "tag_v2", {}).get(262) == 0 and opened.mode != "F"
        wanted = (values - low) / (high - low)
        assert np.abs(found - (1 - wanted if white_is_zero else wanted)).max() < 1e-5, path
        count += 1
    assert count > 15
