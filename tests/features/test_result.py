"""`Features` as an object: parts of a batch, devices, arrays, notebooks."""

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL, randomise
from pictures import complaint, photo
from PIL import Image

from dinov3_infer import Backbone, Features, InputError, InputTypeError, Store


@pytest.fixture(scope="module")
def features() -> Features:
    bb: Any = randomise(Backbone.from_config(SMALL["dinov3"]))
    pictures = [photo(90, 130), photo(130, 90), photo(64, 64)]
    found: Features = bb.extract_features(pictures, size=64, fit="pad", layers=[0, -1], pooling="cls_mean")
    return found


@pytest.mark.parametrize("index, number", [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_one_image_of_a_batch(index: int, number: int, features: Features) -> None:
    """The part holds every tensor and the placement of the image, and it is a copy."""
    one = features[index]
    assert len(one) == 1 and one.placements == (features.placements[number],) and one.grid == features.grid
    for name in ("embedding", "cls_token", "register_tokens", "patch_tokens", "feature_map", "valid"):
        assert torch.equal(getattr(one, name)[0], getattr(features, name)[number])
    for ours, theirs in zip(one.layers, features.layers, strict=True):
        assert torch.equal(ours.feature_map[0], theirs.feature_map[number]) and ours.grid == theirs.grid
        assert torch.equal(ours.cls_token[0], theirs.cls_token[number])
    assert one.embedding.untyped_storage().nbytes() == one.embedding.numel() * 4
    assert one.to_patch(1, 1) == features.to_patch(1, 1, index) == (0, 0)


@pytest.mark.parametrize("index", [3, -4])
def test_an_image_that_is_not_there(index: int, features: Features) -> None:
    assert f"image number {index} does not exist" in complaint(InputError, lambda: features[index])


@pytest.mark.parametrize("index", [slice(0, 2), "0", 1.0], ids=str)
def test_several_images_at_once(index: Any, features: Features) -> None:
    assert type(index).__name__ in complaint(InputTypeError, lambda: features[index])


def test_iteration_ends(features: Features) -> None:
    """Iteration yields each image once and stops."""
    parts = list(features)
    assert len(parts) == 3 and all(isinstance(part, Features) and len(part) == 1 for part in parts)
    assert torch.equal(torch.cat([part.embedding for part in parts]), features.embedding)


def test_to_moves_everything(features: Features) -> None:
    moved = features.to("meta")
    tensors = [moved.embedding, moved.cls_token, moved.register_tokens, moved.patch_tokens, moved.valid]
    tensors += [t for layer in moved.layers for t in (layer.cls_token, layer.register_tokens, layer.patch_tokens)]
    assert all(t is not None and t.is_meta for t in tensors) and moved.placements == features.placements


def test_arrays_lose_nothing(features: Features) -> None:
    """`numpy()` includes layers and `valid` if there are any."""
    arrays = features.numpy()
    names = {"cls_token", "register_tokens", "patch_tokens", "feature_map"}
    assert set(arrays) == names | {"embedding", "valid", "layers"} and len(arrays["layers"]) == 2
    for ours, theirs in zip(arrays["layers"], features.layers, strict=True):
        assert set(ours) == names and all(np.array_equal(ours[n], getattr(theirs, n).numpy()) for n in names)
    assert arrays["valid"].dtype == bool and np.array_equal(arrays["valid"], features.valid)  # type: ignore[arg-type]


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["features", "layers", "output", "store"])
def test_what_a_notebook_prints_is_one_line(part: str, tmp_path: Path) -> None:
    bb = Backbone.from_pretrained("nano")
    images = np.zeros((2, 64, 96, 3), np.uint8)
    if part == "store":
        bb.embed(list(images), tmp_path / "v.npy")
        shown: Any = Store(tmp_path / "v.npy")
    else:
        found = bb.extract_features(images, layers=[0, -1], size=64)
        shown = {"features": found, "layers": found.layers, "output": bb(torch.zeros(1, 3, 64, 64), layers=2)}[part]
    text = repr(shown)
    assert "\n" not in text and len(text) < 500 and "tensor(" not in text and "192" in text


def test_features_have_a_table_with_colours() -> None:
    bb = Backbone.from_pretrained("nano")
    found = bb.extract_features(np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8), size=64)
    table = found._repr_html_()
    assert table.count("<img") == 3 and "<th>embedding</th><td>[3, 192]</td>" in table
    png = base64.b64decode(table.split("base64,")[1].split('"')[0])
    image = Image.open(io.BytesIO(png))
    assert image.size == (4, 4) and len(set(map(tuple, np.asarray(image).reshape(-1, 3)))) > 8
    assert "<img" not in bb.extract_features(np.zeros((16, 16, 3), np.uint8), size=16)._repr_html_()  # one patch
    lost = replace(found, patch_tokens=found.patch_tokens * torch.nan)
    assert "<img" not in lost._repr_html_() and "[3, 16, 192]" in lost._repr_html_()


def test_features_compare_by_value() -> None:
    bb = Backbone.from_pretrained("nano")
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 96, 3), np.uint8)

    def make(**options: Any) -> Any:
        return bb.extract_features(images, **{"size": 64, "layers": 2, **options})

    found = make()
    assert (found == make()) is True and (found != make()) is False and found == found.to("cpu")
    others = [
        make(size=48),
        make(layers=1),
        make(layers=None),
        make(pooling="mean"),
        make(fit="pad"),
        found[0],
        None,
        3,
    ]
    assert not any(found == other for other in others)
    assert found.layers[0] == make().layers[0] and found.layers[0] != found.layers[1] and found.layers[0] != "a"


def test_numpy_takes_the_embedding() -> None:
    found = Backbone.from_pretrained("nano").extract_features(np.zeros((2, 32, 32, 3), np.uint8), pooling="cls_mean")
    array = np.asarray(found)
    assert array.dtype == np.float32 and (array == found.embedding.numpy()).all()
    assert np.array(found, dtype=np.float64).dtype == np.float64 and np.stack([found, found]).shape == (2, 2, 384)
    copied = np.array(found)
    copied[:] = 7
    assert not (found.embedding == 7).any()
