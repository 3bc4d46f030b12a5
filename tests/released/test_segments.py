"""DINOv2's segmentation heads: transformers' features with torch's own modules, windows drawn by hand, wrong files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import randomise, relative
from pictures import photo
from torch import Tensor

from dinov3_infer import Backbone, CheckpointError, InputError, UnsupportedError
from dinov3_infer.checkpoints.reading import open_checkpoint
from dinov3_infer.released import attach
from dinov3_infer.released.attach import load_head, random_head
from dinov3_infer.released.catalogue import find_head
from dinov3_infer.released.segments import Segments, classes_of
from dinov3_infer.released.windows import palette

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def small() -> Backbone:
    return randomise(Backbone.from_config("dinov2_vits14"), 1)  # type: ignore[return-value]


def random_state(width: int, classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "bn.weight": 1 + 0.2 * normal(width), "bn.bias": 0.2 * normal(width), "bn.running_mean": 0.5 * normal(width),
        "bn.running_var": 0.5 + normal(width).abs(), "bn.num_batches_tracked": torch.tensor(40_000),
        "conv_seg.weight": normal(classes, width, 1, 1) * width**-0.5, "conv_seg.bias": normal(classes),
    }  # fmt: skip


def put(path: Path, width: int, classes: int = 150) -> dict[str, Tensor]:
    """A file as mmsegmentation leaves it: the head, and what the training run had beside it."""
    state = random_state(width, classes)
    meta: dict[str, Any] = {
        "mmseg_version": "0.27.0",
        "iter": 40_000,
        "CLASSES": ("wall", "building"),
        "PALETTE": [[120, 120, 120]],
    }
    meta["hook_msgs"] = {"best_score": np.float64(0.47)}
    optimizer = {"state": {0: {"step": 40_000, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    named = {f"decode_head.{name}": tensor for name, tensor in state.items()}
    torch.save({"meta": meta, "state_dict": named, "optimizer": optimizer}, path)
    return state


def by_hand(maps: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Maps [B, C, h, w] -> logits [B, K, h, w], from the formula."""
    state = {name: tensor.to(maps.dtype) for name, tensor in state.items()}
    scale = state["bn.weight"] / (state["bn.running_var"] + 1e-5).sqrt()
    shift = state["bn.bias"] - state["bn.running_mean"] * scale
    normed = maps * scale[:, None, None] + shift[:, None, None]
    return (
        torch.einsum("kc,bchw->bkhw", state["conv_seg.weight"][:, :, 0, 0], normed)
        + state["conv_seg.bias"][:, None, None]
    )


@pytest.mark.parametrize(
    ("name", "classes"),
    [("dinov2_vits14_ade20k_linear", 150), ("dinov2_vits14_ade20k_ms", 150), ("dinov2_vits14_voc2012_ms", 21)],
)
def test_logits_are_those_of_transformers_and_torch(name: str, classes: int, tmp_path: Path) -> None:
    """Features of transformers after its final norm, and the head by its formula; on a model that takes any size."""
    import transformers as t

    config = t.DINOv3ViTConfig(
        hidden_size=192, num_attention_heads=3, num_hidden_layers=4, intermediate_size=768, num_register_tokens=4
    )
    model = randomise(t.DINOv3ViTModel(config), 2)
    model.save_pretrained(tmp_path / "backbone")  # type: ignore[operator]
    layers = 4 if name.endswith("_ms") else 1
    state = put(tmp_path / "head.pth", 192 * layers, classes)
    bb = Backbone.from_pretrained(tmp_path / "backbone", device="cpu")
    head = Segments(replace(find_head(name), backbone="nano"), bb).read(open_checkpoint(tmp_path / "head.pth"))
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(7))
    for dtype, most in ((torch.float64, 1e-7), (torch.float32, 1e-6)):  # its RoPE is float32
        model, head, given = model.to(dtype), head.to(dtype), pixels.to(dtype)
        hidden = model(given, output_hidden_states=True).hidden_states[-layers:]
        maps = [model.norm(h)[:, 5:].mT.unflatten(2, (4, 6)) for h in hidden]  # type: ignore[operator]
        assert relative(head.patch_logits(given), by_hand(torch.cat(maps, dim=1), state)) < most, dtype


@pytest.mark.slow
def test_logits_on_dinov2(tmp_path: Path) -> None:
    """At the one size where all libraries have the same positions, in float64 and float32; a window is stretched."""
    import transformers as t

    config = t.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14)
    model = randomise(t.Dinov2Model(config), 2)
    model.save_pretrained(tmp_path / "backbone")  # type: ignore[operator]
    state = put(tmp_path / "head.pth", 384)
    bb = Backbone.from_pretrained("dinov2_vits14", weights=tmp_path / "backbone", device="cpu")
    head = load_head("dinov2_vits14_ade20k_linear", bb, weights=tmp_path / "head.pth")
    pixels = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(7))
    for dtype, most in ((torch.float64, 1e-9), (torch.float32, 5e-6)):
        model, head, given = model.to(dtype), head.to(dtype), pixels.to(dtype)
        maps = model(F.pad(given, (3, 3, 3, 3))).last_hidden_state[:, 1:].mT.unflatten(2, (37, 37))
        expected = F.interpolate(by_hand(maps, state), size=(512, 512), mode="bilinear", align_corners=False)
        assert relative(head(given), expected) < most, dtype


def patches_as_logits(whole: Tensor) -> Tensor:
    """In place of a backbone and its product: three classes, the mean colours of each patch."""
    return F.avg_pool2d(whole, 14)


def window_of(pixels: Tensor) -> Tensor:
    """One window as the owner's code has it: zeros around up to whole patches, then stretched over the window."""
    height, width = pixels.shape[2:]
    down, across = -height % 14, -width % 14
    padded = F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2))
    return F.interpolate(patches_as_logits(padded), size=(height, width), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(
    ("size", "tops", "lefts"),
    [
        ((300, 200), [0], [0]),
        ((512, 683), [0], [0, 171]),
        ((900, 1500), [0, 341, 388], [0, 341, 682, 988]),
    ],
)
def test_windows(size: tuple[int, int], tops: list[int], lefts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """512 pixels every 341, the last at the border, the mean where they overlap."""
    head = random_head("dinov2_vits14_voc2012_linear")
    monkeypatch.setattr(head, "patch_logits", patches_as_logits)
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    total, count = torch.zeros(2, 3, *size), torch.zeros(size)
    for top in tops:
        for left in lefts:
            rows, columns = slice(top, min(top + 512, size[0])), slice(left, min(left + 512, size[1]))
            total[:, :, rows, columns] += window_of(pixels[:, :, rows, columns])
            count[rows, columns] += 1
    assert count.min() >= 1
    assert torch.allclose(head(pixels), total / count, atol=1e-6)


def test_classes_lie_on_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An edge 25 pixels from the border stays there; stretched over the padding it moves inwards."""
    head = random_head("dinov2_vits14_voc2012_linear")
    monkeypatch.setattr(head, "patch_logits", patches_as_logits)
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, :25, 0] = image[:, 25:, 1] = 255  # the edge of the second patch, after 3 pixels of padding
    (found,) = head.predict(image)  # type: ignore[operator]
    assert [int((row == 0).sum()) for row in found.labels[[100, 256, 400]]] == [25, 25, 25]
    pixels = head.preprocess.batch([image]).pixels
    assert int((head(pixels)[0].argmax(dim=0)[256] == 0).sum()) == 27


def test_an_image_at_its_own_size(small: Backbone, tmp_path: Path) -> None:
    """The short side is 512 for the model, and labels come back at the size of each image, alone or among others."""
    put(tmp_path / "head.pth", 384, 21)
    head = load_head("dinov2_vits14_voc2012_linear", small, weights=tmp_path / "head.pth")
    image = photo(60, 90)
    (found,) = head.predict(image, size=56)
    assert found.labels.shape == (60, 90) and found.labels.dtype == torch.int64
    assert found.names == classes_of("voc2012")[0] and found.colours[1] == (128, 0, 0)
    pixels = head.preprocess.with_options(84).batch([image]).pixels
    assert pixels.shape == (1, 3, 56, 84)  # whole patches
    logits = F.interpolate(head.patch_logits(pixels), size=(56, 84), mode="bilinear", align_corners=False)
    expected = F.interpolate(logits, size=(60, 90), mode="bilinear", align_corners=False)[0].argmax(dim=0)
    assert torch.equal(found.labels, expected) and len(expected.unique()) > 1
    both = head.predict([photo(30, 41), image], size=56)
    assert [m.labels.shape for m in both] == [(30, 41), (60, 90)] and torch.equal(both[1].labels, found.labels)


@pytest.mark.parametrize(
    ("sides", "size", "seen"),
    [
        ((300, 400), 512, (512, 683)), ((640, 480), 512, (683, 512)), ((1024, 2048), 512, (512, 1024)),
        ((40, 4000), 512, (20, 2048)), ((300, 400), 56, (56, 75)),
    ],
)  # fmt: skip
def test_what_the_model_sees(
    sides: tuple[int, int], size: int, seen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short side has `size` pixels, and the long one never more than 2,048."""
    head = random_head("dinov2_vits14_ade20k_linear")
    asked: list[Any] = []

    def windows(pixels: Tensor, stretched: bool) -> Tensor:
        asked.append((tuple(pixels.shape[2:]), stretched))
        return pixels

    monkeypatch.setattr(head, "_in_windows", windows)
    (found,) = head.predict(np.zeros((*sides, 3), np.uint8), size)  # type: ignore[operator]
    assert asked == [(seen, False)] and found.labels.shape == sides


PARAMETERS = {
    "dinov2_vits14_ade20k_linear": 59_286, "dinov2_vitb14_ade20k_linear": 118_422,
    "dinov2_vitl14_ade20k_linear": 157_846, "dinov2_vitg14_ade20k_linear": 236_694,
    "dinov2_vits14_ade20k_ms": 236_694, "dinov2_vitb14_ade20k_ms": 473_238, "dinov2_vitl14_ade20k_ms": 630_934,
    "dinov2_vitg14_ade20k_ms": 946_326,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_that_were_published(name: str) -> None:
    info = find_head(name)
    with torch.device("meta"):
        head = Segments(info, Backbone.from_config(info.backbone))
    assert sum(t.numel() for t in head.head_state().values() if t.ndim) == PARAMETERS[name]  # with mean and variance
    assert info.link == f"https://dl.fbaipublicfiles.com/dinov2/{info.backbone}/{name}_head.pth"


def test_names_and_colours() -> None:
    """In the order of the data sets; those of VOC follow from the bits of the number."""
    names, colours = classes_of("ade20k")
    assert len(names) == len(set(names)) == len(colours) == 150
    assert [names[i] for i in (0, 2, 12, 20, 149)] == ["wall", "sky", "person", "car", "flag"]
    assert (colours[0], colours[12], colours[149]) == ((120, 120, 120), (150, 5, 61), (92, 0, 255))
    names, colours = classes_of("voc2012")
    assert (names[0], names[8], names[15], names[20]) == ("background", "cat", "person", "tvmonitor")
    assert len(names) == len(set(names)) == len(set(colours)) == 21
    assert colours[1:] == palette(20) and (colours[0], colours[15]) == ((0, 0, 0), (192, 128, 128))


def test_wrong_files_backbones_and_sizes(small: Backbone, tmp_path: Path) -> None:
    """One sentence each."""
    name, path = "dinov2_vits14_ade20k_linear", tmp_path / "head.pth"
    put(path, 384, 21)
    with pytest.raises(CheckpointError, match=r"2 of another shape: .*conv_seg.weight \[21, 384, 1, 1\] for"):
        load_head(name, small, weights=path)
    put(path, 4 * 384)
    with pytest.raises(CheckpointError, match=r"5 of another shape: .* is it that head's file\?"):
        load_head(name, small, weights=path)
    state = put(path, 384)
    head = load_head(name, small, weights=path)
    for size in (0, 13, 2049, "512", (512, 512), None):
        with pytest.raises(InputError, match=r"size is the short side in pixels, from 14 to 2048, got"):
            head.predict(photo(30, 30), size)
    torch.save({n: t for n, t in state.items() if n != "bn.running_var"}, path)
    with pytest.raises(CheckpointError, match="1 missing: bn.running_var"):
        load_head(name, small, weights=path)
    torch.save(state | {"bn.extra": state["bn.bias"]}, path)
    with pytest.raises(CheckpointError, match="1 left over: bn.extra"):
        load_head(name, small, weights=path)
    torch.save(state | {"bn.bias": state["bn.bias"] / 0}, path)
    with pytest.raises(CheckpointError, match="NaN or infinity in bn.bias"):
        load_head(name, small, weights=path)
    with pytest.raises(InputError, match=f"{name} goes on dinov2_vits14, and this backbone looks like"):
        load_head(name, Backbone.from_config("dinov2_vits14_reg"), weights=path)
    saved = head.save(tmp_path / "head.safetensors")
    again = load_head(name, small, weights=saved)
    assert all(torch.equal(t, again.head_state()[n]) for n, t in head.head_state().items())
    with pytest.raises(CheckpointError, match="goes with other weights of its backbone"):
        load_head(name, randomise(Backbone.from_config("dinov2_vits14"), 9), weights=saved)  # type: ignore[arg-type]


def test_open_weights_are_downloaded(
    small: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the owner's server; the licence is said once; what is no head of this kind does not stay in the cache."""
    name, path, asked = "dinov2_vits14_ade20k_linear", tmp_path / "head.pth", []

    def download(link: str, *, check: Any, **_: Any) -> tuple[Path, bool]:
        asked.append(link)
        check(path)
        return path, len(asked) == 1

    monkeypatch.setattr(attach, "download", download)
    state = put(path, 384)
    for _ in range(2):
        head = load_head(name, small)
        assert torch.equal(head.conv_seg.weight, state["conv_seg.weight"])
    assert asked == [find_head(name).link] * 2
    said = [record.getMessage() for record in caplog.records if "licence" in record.getMessage()]
    assert len(said) == 1 and said[0].endswith("the licence of these weights: Apache-2.0")
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=f"{name}_head.pth' is not the head {name}"):
        load_head(name, small)


@pytest.mark.parametrize("name", ["dinov3_vit7b16_de", "dinov3_vit7b16_ms", "dinov2_vitg14_ade20k_m2f"])
def test_what_is_left_out_says_why(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} is not here: .*; train a head of dinov3_infer.tasks"):
        load_head(name)
