"""Real weights on real photographs: maps show what a person would point at."""

from pathlib import Path

import fetch
import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_infer import Backbone
from dinov3_infer.tasks.overlay import at_pixels
from dinov3_infer.tasks.pca import foreground
from dinov3_infer.tasks.similarity import region_vector, similarity_map

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def bb(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    pytest.importorskip("onnx", reason="the real weights lie in an ONNX file: pip install onnx")
    directory: Path = fetch.write_dinov2_vits14(tmp_path_factory.mktemp("weights"))[0]
    return Backbone.from_pretrained(directory, device="cpu")


@pytest.fixture(scope="module")
def photographs() -> dict[str, Image.Image]:
    return fetch.photographs()


def ellipse(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """[H, W] bool, an ellipse drawn by hand around an object in a photograph of this (width, height)."""
    y, x = np.mgrid[: size[1], : size[0]]
    inside = ((x - (left + right) / 2) / (right - left)) ** 2 + ((y - (top + bottom) / 2) / (bottom - top)) ** 2
    return inside <= 0.25


def test_one_eye_of_the_cat_finds_the_other(bb, photographs) -> None:
    """Away from the left eye, the pixel most similar to it lies on the right eye."""
    cat = photographs["chelsea"]
    features = bb.extract_features(cat, size=768, fit="native")
    found = at_pixels(similarity_map(features, region_vector(features, point=(178, 115))), None, (300, 451))[0].numpy()
    found[ellipse(cat.size, 130, 70, 226, 160)] = -1
    y, x = np.unravel_index(found.argmax(), found.shape)
    print(f"found at ({x}, {y}), cosine {found.max():.3f}")
    assert ellipse(cat.size, 298, 110, 365, 170)[y, x]


@pytest.mark.parametrize("name, box", [("coffee", (80, 20, 490, 395)), ("astronaut", (150, 15, 315, 205))])
def test_the_class_token_looks_at_the_thing(name, box, bb, photographs) -> None:
    """Attention per area is at least 1.5 times as high on cup and saucer, and on face and hair, as around."""
    picture = photographs[name]
    maps = at_pixels(bb.attention_maps(picture)[0].mean(dim=0)[None], None, picture.size[::-1])[0].numpy()
    thing = ellipse(picture.size, *box)
    ratio = maps[thing].mean() / maps[~thing].mean()
    print(f"{name}: {ratio:.2f}")
    assert ratio > 1.5


def test_the_first_component_is_the_thing(bb, photographs) -> None:
    """Cup and saucer are found with an intersection over union above 0.7 with a hand-drawn ellipse."""
    picture = photographs["coffee"]
    (mask,) = foreground(bb.extract_features(picture, size=768, fit="native"))
    found = at_pixels(torch.from_numpy(mask)[None].float(), None, picture.size[::-1])[0].numpy() > 0.5
    thing = ellipse(picture.size, 80, 20, 490, 395)
    overlap = (found & thing).sum() / (found | thing).sum()
    print(f"intersection over union {overlap:.3f}")
    assert overlap > 0.7
