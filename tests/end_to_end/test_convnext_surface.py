"""A ConvNeXt in every function that takes a backbone: what works, and what raises one sentence."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_runs import refused, run
from fill import filled
from pictures import photo
from PIL import Image

from dinov3_infer import Backbone, ConvNeXtConfig, InputError, UnsupportedError
from dinov3_infer.model.cpu.linear import why_not_packed
from dinov3_infer.tasks import LinearProbe, Pyramid, dense_features
from dinov3_infer.torchhub import HubBackbone

SMALL = ConvNeXtConfig((2, 1, 3, 1), (16, 32, 48, 64))
PHOTOS = [photo(*size) for size in ((96, 64), (64, 64), (200, 130), (64, 64), (40, 300), (96, 64), (64, 64))]


@pytest.fixture(scope="module")
def bb() -> Backbone:
    return filled(Backbone(SMALL), 3)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def saved(bb: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bb.save_pretrained(tmp_path_factory.mktemp("convnext") / "hf")


def test_features_have_the_names_that_all_have(bb: Backbone) -> None:
    """Each stage has its own grid and width; there are no registers."""
    f = bb.extract_features(PHOTOS[2], size=128, fit="native", layers=4)
    assert f.input_size == (128, 96) and f.grid == (4, 3) and f.feature_map.shape == (1, 64, 4, 3)
    assert f.register_tokens.shape == (1, 0, 64) and f.embedding.equal(f.cls_token)
    assert f.original_sizes == ((200, 130),)
    assert [layer.feature_map.shape[1:] for layer in f.layers] == [(16, 32, 24), (32, 16, 12), (48, 8, 6), (64, 4, 3)]
    assert f.layers[3].patch_tokens.equal(f.patch_tokens) and f.to_patch(129, 199) == (3, 2)
    pixels = bb.preprocess.with_options(128, "native").batch([PHOTOS[2]]).pixels
    with torch.no_grad():
        torch.testing.assert_close(bb(pixels).patch_tokens, f.patch_tokens, rtol=0, atol=1e-5)


def test_an_image_has_the_same_bits_in_any_company(bb: Backbone) -> None:
    """The vector is equal bit for bit alone, in batches of any size and in another order."""
    alone = [bb.extract_features(image, fit="native", size=160) for image in PHOTOS]
    for batch_size in (1, 3, 7):
        found = list(bb.iter_features(PHOTOS, fit="native", size=160, batch_size=batch_size))
        turned = list(bb.iter_features(PHOTOS[::-1], fit="native", size=160, batch_size=batch_size))[::-1]
        for one, other, third in zip(alone, found, turned, strict=True):
            for name in ("cls_token", "patch_tokens"):
                assert getattr(one, name).equal(getattr(other, name)) and getattr(one, name).equal(getattr(third, name))


def test_embed_in_memory_and_on_disk(bb: Backbone, tmp_path: Path) -> None:
    """Covers embeddings, maps and patches; a rerun finds the existing rows."""
    rows = bb.embed(PHOTOS, size=64, pooling="cls_mean")
    assert rows.shape == (7, 128) and bb.embed(PHOTOS, size=64, kind="map").shape == (7, 64, 2, 2)
    for i, image in enumerate(PHOTOS):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for _ in range(2):
        report = bb.embed(sorted(tmp_path.glob("*.png")), tmp_path / "rows.npy", size=64, pooling="cls_mean")
        assert report.shape == (7, 128)
    assert np.array_equal(np.load(tmp_path / "rows.npy"), rows)
    assert LinearProbe().fit(rows, np.arange(7) % 2).predict(rows).shape == (7,)


@pytest.mark.parametrize("size", [(64, 96), (70, 100), (33, 31)], ids=str)
def test_a_pyramid_takes_each_stage_for_its_stride(bb: Backbone, size: tuple[int, int]) -> None:
    pyramid = Pyramid(bb, 12).eval()
    assert list(pyramid.layers.values()) == [0, 1, 2, 3] and pyramid.size_divisibility == 32
    pixels = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps = pyramid(pixels)
        assert [tuple(m.shape) for m in maps.values()] == [
            (1, 12, -(-size[0] // stride), -(-size[1] // stride)) for stride in (4, 8, 16, 32)
        ]
        bb.stages[3][0].gamma.mul_(2.0)  # type: ignore[index, operator]
        after = pyramid(pixels)
        bb.stages[3][0].gamma.div_(2.0)  # type: ignore[index, operator]
    assert [bool(torch.equal(maps[name], after[name])) for name in maps] == [True, True, True, False]


def test_dense_features_lie_on_the_grid_of_their_stage(bb: Backbone) -> None:
    whole = dense_features(bb, PHOTOS[2], size=192, layers=[1])
    assert whole.grid == (24, 16) and whole.feature_map.shape == (1, 32, 24, 16)
    one = bb.extract_features(PHOTOS[2], size=192, fit="native", layers=[1]).layers[0]
    torch.testing.assert_close(whole.feature_map, one.feature_map, rtol=0, atol=1e-4)
    assert dense_features(bb, PHOTOS[2], size=192, layers=[1], tile=64).grid == (24, 16)
    with pytest.raises(InputError, match="maps of 2 sizes, which cannot be concatenated; give one layer"):
        dense_features(bb, PHOTOS[2], layers=2)


@pytest.mark.parametrize("dynamic", ["batch", True, False], ids=str)
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_export_checks_itself(bb: Backbone, tmp_path: Path, suffix: str, dynamic: Any) -> None:
    """The file has class token and patches at several sizes, and no registers among its outputs."""
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
        onnxruntime = pytest.importorskip("onnxruntime")
    path = bb.export(tmp_path / f"a{suffix}", size=(64, 96), dynamic=dynamic)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]


def test_torch_hub_gives_what_metas_entry_gives(bb: Backbone, tmp_path: Path, no_grad: None) -> None:
    """Covers the class token, the dictionary in training, and maps on the grid given to the constructor."""
    model = HubBackbone.from_pretrained(bb.save_pretrained(tmp_path / "a.pth", "meta"), device="cpu")
    pixels = torch.randn(2, 3, 64, 96)
    expected = bb.forward_features(pixels)  # type: ignore[operator]
    assert model(pixels).equal(expected["x_norm_clstoken"])
    assert model(pixels, is_training=True)["x_prenorm"].equal(expected["x_prenorm"])
    several = model([pixels, pixels[..., :32]])
    assert several[0].equal(expected["x_norm_clstoken"]) and len(several) == 2
    assert model.extract_features(PHOTOS[0], size=64).cls_token.equal(bb.extract_features(PHOTOS[0], size=64).cls_token)
    assert model.get_intermediate_layers(pixels, 2, True)[0].shape == (2, 48, 4, 6)  # type: ignore[operator]
    model.output_patch_size = 8  # type: ignore[assignment]
    assert [m.shape[2:] for m in model.get_intermediate_layers(pixels, 4, True)] == [(8, 12)] * 4  # type: ignore[operator]


def test_other_precisions(bb: Backbone, saved: Path) -> None:
    """Weights are bfloat16, norms and results float32; modes for vision transformers log one line."""
    half = Backbone.from_pretrained(saved, dtype="bfloat16", device="cpu")
    assert half.norm.weight.dtype == torch.float32 and half.main_weight.dtype == torch.bfloat16
    found, exact = (m.extract_features(PHOTOS[0], size=64).cls_token for m in (half, bb))
    assert found.dtype == torch.float32 and 1e-5 < float((found - exact).norm() / exact.norm()) < 3e-2


@pytest.mark.planned
@pytest.mark.parametrize("mode", ["exact", "fast", "int8"])
def test_modes_on_a_cpu(bb: Backbone, saved: Path, mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Packed products agree with the plain model; "int8" gives way to the next mode of this machine."""
    model = Backbone.from_pretrained(saved, mode=mode, device="cpu")
    with caplog.at_level(logging.WARNING, "dinov3_infer"):
        found = model.extract_features(PHOTOS[2], size=96, layers=4)
    plan = plan_of_(model)
    lacking = why_not_packed() or (mode != "exact" and why_not_packed(torch.bfloat16))
    assert (plan is None) == (why_not_packed() is not None)
    assert ("mode='int8' is not available here" in caplog.text) == (mode == "int8")
    assert plan is None or plan.mode == ("exact" if mode == "exact" or lacking else "fast")
    plain = bb.extract_features(PHOTOS[2], size=96, layers=4)
    limit = 2e-2 if plan is not None and plan.mode == "fast" else 2e-6
    for one, other in zip((found, *found.layers), (plain, *plain.layers), strict=True):
        for name in ("cls_token", "patch_tokens"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.dtype == torch.float32 and float((a - b).norm() / b.norm()) < limit
    model.norm.weight.data.mul_(2.0)  # type: ignore[union-attr, operator]
    assert not model.extract_features(PHOTOS[2], size=96).cls_token.equal(found.cls_token)


def plan_of_(model: Backbone) -> Any:
    with torch.no_grad():
        return model.extractor.plan()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("side", [(32, 32), (64, 96), (224, 224)], ids=str)
def test_packed_products_do_not_look_at_the_batch(side: tuple[int, int], threads: int) -> None:
    """Equal bit for bit, at the width of the smallest released model."""
    model = filled(Backbone(ConvNeXtConfig((1, 1, 1, 1), (96, 192, 384, 768))), 1)
    images = list(torch.rand(5, 3, *side))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = [model.extract_features(image, size=side, layers=4) for image in images]  # type: ignore[operator]
        for count in (2, 3, 5):
            together = model.extract_features(images[:count], size=side, layers=4)  # type: ignore[operator]
            for i in range(count):
                for one, whole in zip((alone[i], *alone[i].layers), (together, *together.layers), strict=True):
                    assert one.cls_token[0].equal(whole.cls_token[i])
                    assert one.patch_tokens[0].equal(whole.patch_tokens[i])
    finally:
        torch.set_num_threads(before)


def test_gradients_reach_every_parameter(bb: Backbone) -> None:
    model = Backbone(SMALL).train()
    output = model(torch.randn(2, 3, 64, 64), layers=[0, 1, 2])
    sum(t.square().sum() for t in (output.cls_token, output.patch_tokens)).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_adapters_of_peft(saved: Path) -> None:
    """Adapters attach to the two linear layers of a block, which are called as modules."""
    peft = pytest.importorskip("peft")
    model = Backbone.from_pretrained(saved, device="cpu")
    before = model.extract_features(PHOTOS[0], size=64).cls_token
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["pwconv1", "pwconv2"]), model)
    torch.testing.assert_close(adapted.extract_features(PHOTOS[0], size=64).cls_token, before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    assert not adapted.extract_features(PHOTOS[0], size=64).cls_token.equal(before)
    with pytest.raises(UnsupportedError, match="has an adapter that is not merged"):
        adapted.save_pretrained(saved.parent / "adapted")


def test_the_trainer_refuses_it(saved: Path, tmp_path: Path) -> None:
    from dinov3_infer.train import TrainConfig, train

    config = TrainConfig.preset("adapt", data=("x",), model=str(saved), out=str(tmp_path / "run"), device="cpu")
    with pytest.raises(UnsupportedError, match="training supports vision transformers"):
        train(config, data=torch.zeros(128, 3, 64, 64, dtype=torch.uint8))  # type: ignore[arg-type]


def test_commands(saved: Path, tmp_path: Path) -> None:
    """`verify`, `features` and `show` work; commands that need attention are refused."""
    picture = Path(__file__).parents[2] / "dinov3_infer/data/samples/cat.png"
    ran = run("verify", saved)
    assert "ConvNeXt with stages of 2 1 3 1 blocks" in ran.out and "no fault found" in ran.out
    assert run("features", picture, "-m", saved, "--out", tmp_path / "a", "--layers", "0,1", "--size", "64").status == 0
    assert json.loads((tmp_path / "a/index.jsonl").read_text())["error"] == ""
    words = "maps of several sizes, which do not fit into one .npy array"
    refused(1, words, "features", picture, "-m", saved, "--out", tmp_path / "b", "--layers", "0,1", "--format", "npy")
    assert run("show", "pca", picture, "-m", saved, "--out", tmp_path / "a.png", "--size", "96").status == 0
    refused(1, "needs attention", "show", "attention", picture, "-m", saved, "--out", tmp_path / "b.png")
