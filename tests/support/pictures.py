"""Test images, and a check of the form of an error."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dinov3_infer.errors import Dinov3Error
from dinov3_infer.images.preprocess import Preprocess

FITS = [("squash", 64), ("crop", 64), ("pad", 96), ("native", 96)]
by_fit = pytest.mark.parametrize(("fit", "size"), FITS, ids=[fit for fit, _ in FITS])


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image [H, W, 3] uint8 of smooth shades and strong noise, in which a wrong filter shows."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    shades = 128 + 100 * np.sin(np.stack((x / 17, y / 23, (x + y) / 31), axis=-1))
    return np.clip(shades + rng.normal(0, 40, shades.shape), 0, 255).astype(np.uint8)


def plain(size: int | tuple[int, int] | None, patch_size: int = 1, **options: Any) -> Preprocess:
    """A transform without normalisation: its pixels are grey levels / 255."""
    return Preprocess((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), patch_size, size, **options)


def complaint(error: type[Exception], call: Callable[[], object]) -> str:
    """The message of the error that a call must raise: one sentence, without object addresses."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert isinstance(caught.value, Dinov3Error)
    assert "\n" not in text and not re.search(r"(?<!\d)0x[0-9a-f]{4}", text)
    return text
