"""Properties of a Backbone, and errors for wrong options before weights are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SMALL
from pictures import complaint

from dinov3_infer import (
    Backbone,
    CheckpointError,
    InputError,
    InputTypeError,
    PrecisionError,
    UnsupportedError,
    ViTConfig,
)
from dinov3_infer.backbone import ViTBackbone
from dinov3_infer.model.network import resolve_layers


def test_an_architecture_of_ones_own_has_a_transform_too() -> None:
    bb = Backbone.from_config(SMALL["dinov3"])
    assert bb.info is None
    assert bb.extract_features(torch.rand(3, 50, 70)).grid == (16, 16)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(device="gpu"), "device is 'auto' or a torch device"),
        (dict(dtype="float8"), "dtype is 'auto', float32"),
        (dict(attn_implementation="flash"), "attn_implementation is one of"),
        (dict(rope_periods="rounded"), "rope_periods is 'exact'"),
        (dict(layout="tensorflow"), "layout"),
        (dict(preprocessing="torchvision"), "preprocessing='torchvision' does not exist"),
    ],
    ids=lambda v: str(v),
)
def test_wrong_options_are_said(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    saved = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        Backbone.from_pretrained(saved, **options)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    saved = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="sees no CUDA"):
        Backbone.from_pretrained(saved, device="cuda")


def test_triton_is_not_here_yet(tmp_path: Path) -> None:
    saved = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="use 'auto'"):
        Backbone.from_pretrained(saved, attn_implementation="triton")


def test_eager_attention_gives_the_same(tmp_path: Path) -> None:
    saved = Backbone.from_config("nano", seed=0).save_pretrained(tmp_path)
    picture = torch.rand(3, 64, 64)
    fast, eager = (
        Backbone.from_pretrained(saved, attn_implementation=name).extract_features(picture).embedding
        for name in ("auto", "eager")
    )
    assert torch.allclose(fast, eager, atol=1e-5)


def test_random_weights_are_repeatable_and_leave_the_generator_alone() -> None:
    config = ViTConfig(64, 1, 4, 64)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = Backbone.from_config(config, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert first.fingerprint() == Backbone.from_config(config, seed=1).fingerprint()
    assert first.fingerprint() != Backbone.from_config(config, seed=2).fingerprint()


def test_a_file_with_the_name_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    with pytest.raises(CheckpointError, match="has the name of dinov3_vitl16_sat493m's file"):
        Backbone.from_pretrained("vitl16", weights=file)


def test_a_bare_state_dict_of_ours(tmp_path: Path) -> None:
    torch.save(Backbone.from_config("nano", seed=0).state_dict(), tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match="state_dict of a Backbone.*save_pretrained"):
        Backbone.from_pretrained(tmp_path / "own.pth")


@pytest.mark.parametrize("wrong", [None, 5, "", ["vits16"]], ids=repr)
def test_what_is_no_name(wrong: Any) -> None:
    with pytest.raises(InputTypeError, match="a model is a name"):
        Backbone.from_pretrained(wrong)


def test_what_is_no_config_or_module() -> None:
    for call in (lambda: Backbone.from_config(None), lambda: Backbone.adopt(None)):  # type: ignore[arg-type]
        with pytest.raises(InputTypeError, match="takes a"):
            call()


@pytest.mark.parametrize(
    "options",
    [dict(num_heads=0), dict(depth=-2), dict(num_registers=-1), dict(position_resize="ofset"), dict(num_heads=5)],
    ids=str,
)
def test_impossible_configs(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        ViTConfig(**{"embed_dim": 96, "depth": 2, "num_heads": 2, "ffn_dim": 100} | options)


def test_features_show_their_shapes_and_not_their_numbers() -> None:
    features = Backbone.from_config(SMALL["dinov3"], seed=0).extract_features(torch.rand(3, 64, 64))
    assert repr(features).startswith("Features(embedding [1, 64], cls_token [1, 64]") and len(repr(features)) < 250
    with pytest.raises(InputError, match="image number 3 does not exist"):
        features.to_patch(1, 1, index=3)
    with pytest.raises(InputTypeError, match="compares Features with Features"):
        features.similarity(features.embedding)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["pixels.jpg", [[1.0]], None], ids=repr)
def test_the_model_itself_takes_tensors(wrong: Any) -> None:
    bb = Backbone.from_config(SMALL["dinov3"], seed=0)
    with pytest.raises(InputTypeError, match="takes a tensor.*extract_features"):
        bb(wrong)
    with pytest.raises(InputTypeError, match="takes a list"):
        bb.forward_packed(torch.rand(1, 3, 32, 32))  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", ["3", 1.0, [1.0], [None], torch.tensor([0, 1.5])], ids=repr)
def test_layers_that_are_no_numbers(layers: Any) -> None:
    with pytest.raises(InputTypeError, match="layers is a number of blocks or a list"):
        resolve_layers(layers, 2)


def test_layers_in_every_form() -> None:
    forms = ([0, -1], (0, 1), iter([0, 1]), np.array([0, 1]), torch.tensor([0, 1]), 2, np.int64(2), torch.tensor(2))
    assert all(resolve_layers(layers, 2) == [0, 1] for layers in forms)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_said() -> None:
    bb = Backbone.from_config(SMALL["dinov3"], seed=0)
    with torch.no_grad():
        bb.norm.weight[0] = float("nan")
    with pytest.raises(PrecisionError, match="the weights hold NaN"):
        bb.extract_features(torch.rand(3, 64, 64))


# --- habits of other libraries ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["vitb16", "facebook/dinov3-vits16-pretrain-lvd1689m", None, {"depth": 2}, 7])
@pytest.mark.parametrize("kind", [Backbone, ViTBackbone])
def test_the_constructor_says_what_loads_a_model(kind: Any, wrong: Any) -> None:
    said = complaint(InputTypeError, lambda: kind(wrong))
    assert f"Backbone.from_pretrained('{wrong if isinstance(wrong, str) else 'NAME'}') loads a model" in said


def test_keywords_of_transformers() -> None:
    bb = Backbone.from_pretrained("nano", torch_dtype=torch.bfloat16)  # type: ignore[call-arg]
    assert bb.dtype == torch.bfloat16 == bb.patch_embed.proj.weight.dtype
    for device_map in ("auto", {"": 0}):
        said = complaint(InputTypeError, lambda m=device_map: Backbone.from_pretrained("nano", device_map=m))  # type: ignore[call-arg,misc]
        assert "device_map is named device here" in said
    with pytest.raises(TypeError, match="trust_remote_code"):
        Backbone.from_pretrained("nano", trust_remote_code=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="dtype"):
        Backbone.from_pretrained("nano", dtype="float32", torch_dtype="float32")  # type: ignore[call-arg]


def test_pixel_values_are_pixels() -> None:
    bb, x = Backbone.from_pretrained("nano"), torch.rand(2, 3, 64, 64)
    expected = bb(x, layers=[0])
    for found in (bb(pixel_values=x, layers=[0]), bb(**{"pixel_values": x, "layers": [0]}), bb(pixels=x, layers=[0])):
        assert torch.equal(found.cls_token, expected.cls_token) and torch.equal(
            *(f.layers[0][2] for f in (found, expected))
        )
    with pytest.raises(TypeError):
        bb(x, pixel_values=x)
    compiled = torch.compile(bb, fullgraph=True, backend="eager")
    assert torch.equal(compiled(pixel_values=x).cls_token, bb(x).cls_token)


@pytest.mark.peers
def test_what_a_processor_of_transformers_gives_goes_in() -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    bb = Backbone.from_pretrained("nano")
    assert bb(**processor(np.zeros((90, 80, 3), np.uint8), return_tensors="pt")).cls_token.shape == (1, 192)


def test_preprocess_takes_a_list() -> None:
    preprocess = Backbone.from_pretrained("nano").preprocess
    images = [np.full((40, 60, 3), value, np.uint8) for value in (0, 255)]
    found = preprocess(images)
    assert found.shape == (2, 3, 256, 256) and torch.equal(found[1], preprocess(images[1]))
    assert "different grids" in complaint(
        InputError, lambda: preprocess.with_options(fit="native")([images[0], images[0].transpose(1, 0, 2)])
    )
    assert "got no" in complaint(InputError, lambda: preprocess([]))
