"""The JPEG decoder can reduce an image; nothing else changes."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from archives import CONTENT
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, ImageError, MissingFileError, load_image
from dinov3_infer.images.decode import decode


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize("fit, size", [("squash", 224), ("crop", 224), ("native", 400), ("pad", 224)])
def test_fast_decoding_stays_above_what_is_needed(fit: Any, size: int, turned: int, tmp_path: Path) -> None:
    """A reduced image is upright, not below the target size, placed like the whole image, with nearly its pixels."""
    exif = Image.Exif()
    exif[274] = turned
    image = Image.fromarray(photo(120, 200)).resize((2000, 1203), Image.Resampling.BICUBIC)
    image.save(tmp_path / "a.jpg", quality=95, exif=exif)
    transform = Backbone.from_config("nano").preprocess.with_options(size, fit)

    def wanted(height: int, width: int) -> tuple[int, int]:
        return transform.plan(height, width).resized

    whole = load_image(tmp_path / "a.jpg")
    small, original = decode(str(tmp_path / "a.jpg"), "a", wanted)
    assert original == tuple(whole.shape[1:]) and small.shape[1] < whole.shape[1] // 2
    need = wanted(*original)
    assert small.shape[1] >= need[0] and small.shape[2] >= need[1]
    exact, placement = transform.place(whole)
    fast, placed = transform.place(small, original=original)
    assert placed == placement and fast.shape == exact.shape and (fast - exact).abs().mean() < 0.08
    assert decode((tmp_path / "a.jpg").read_bytes(), "a", wanted)[0].shape == small.shape


def test_fast_decoding_leaves_the_rest_as_it_is(tmp_path: Path) -> None:
    """Other formats, small JPEGs and damaged files are not affected."""
    assert torch.equal(decode(CONTENT[0], "a", lambda h, w: (4, 4)).image, load_image(CONTENT[0]))
    stream = io.BytesIO()
    Image.fromarray(photo(60, 60)).save(stream, "JPEG")
    assert torch.equal(decode(stream.getvalue(), "a", lambda h, w: (50, 50)).image, load_image(stream.getvalue()))
    complaint(ImageError, lambda: decode(stream.getvalue()[:300], "a", lambda h, w: (4, 4)))
    complaint(MissingFileError, lambda: decode(str(tmp_path / "none.jpg"), "a", lambda h, w: (4, 4)))
